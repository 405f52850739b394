"""What `pipelines/faults.py` is made of."""
