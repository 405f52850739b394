"""What a run is told to do: the schema, reading it, the keys that go on to other libraries, the steps' names."""
