"""One run: its steps in order, what it is made from, its log, status and results."""
