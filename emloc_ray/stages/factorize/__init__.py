"""The emulator, made from Grams."""
