"""Fine-tuning of the sampler as a policy against a critic: SFT-PG, and SFT through the chain."""
