"""Fine-tuning of the sampler as a policy against a critic, by one of three gradients."""
