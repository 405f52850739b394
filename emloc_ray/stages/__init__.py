"""The stages: each a plain function over artifact paths, and its Ray wrapper."""

STAGES = ("calibrate", "factorize", "finetune", "correct", "merge", "evaluate")
# Their work is a bag of independent tasks, of which as many go at once as there is room for, with one result.
BAGS = ("factorize", "correct", "merge")
