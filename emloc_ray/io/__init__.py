"""Checkpoints, files and run directories: torch, safetensors and pyarrow, no ray."""
