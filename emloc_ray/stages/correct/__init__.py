"""The correction of the adapter for the difference between emulator and original."""
