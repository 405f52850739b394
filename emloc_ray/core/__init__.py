"""The method itself: pure functions of tensors, torch and nothing else."""
