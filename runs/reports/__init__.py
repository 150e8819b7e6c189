"""What a person sees of a run: the screen, tables, pictures."""
