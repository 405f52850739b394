"""What `pipelines/ablation.py` is made of."""
