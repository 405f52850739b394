"""The parts of ``pipelines/census.py``."""
