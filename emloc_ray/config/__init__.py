"""A run's settings: the schema, reading it, the keys passed on to other libraries, the steps' names."""
