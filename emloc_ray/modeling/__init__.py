"""What the method needs of transformers and PEFT: names, traces, the emulator, the adapter."""
