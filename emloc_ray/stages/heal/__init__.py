"""The healing: the original's logits distilled into the emulator."""
