"""The adapter, trained on the emulator."""
