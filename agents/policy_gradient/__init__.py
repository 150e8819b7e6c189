"""Fine-tuning of the sampler as a policy against a critic, by three gradients: SFT-PG, SFT-V, SFT."""
