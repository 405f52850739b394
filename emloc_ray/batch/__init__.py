"""Many fine-tuning tasks from one base config, on one cluster."""
