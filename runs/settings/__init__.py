"""What flags and settings files mean."""
