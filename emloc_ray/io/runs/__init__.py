"""A run's directory, its cache and what it is recognised by."""
