"""The part of the benchmark that a GPU runs."""
