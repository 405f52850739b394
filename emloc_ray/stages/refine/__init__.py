"""The refinement: each block of the emulator is fitted to the original's."""
