"""Tasks made on the spot from what is installed."""
