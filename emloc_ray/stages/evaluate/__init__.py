"""The evaluation of every variant on the held-out rows."""
