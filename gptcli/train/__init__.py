"""Training: plan, trainer, checkpoints."""
