"""One run: its steps in order, its log, status and results."""
