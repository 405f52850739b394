"""The steps of a run: each an object in a file of its own, beside the plain functions and the tasks that do it."""
