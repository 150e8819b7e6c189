"""What every folder may use, and knows nothing of diffusion."""
