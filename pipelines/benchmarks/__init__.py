"""What `pipelines/benchmark.py` is made of."""
