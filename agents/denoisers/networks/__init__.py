"""Networks that a denoiser may hold: small ones of ours, and the U-Nets of diffusers."""
