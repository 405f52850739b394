"""The stages: each a plain function over artifact paths, and its Ray wrapper."""

STAGES = ("calibrate", "factorize", "heal", "finetune", "correct", "merge", "evaluate")
# All their workers have to be there at once.
GROUPS = ("heal", "finetune")
# Their work is a bag of independent tasks, of which as many go at once as there is room for, with one result.
BAGS = ("factorize", "correct", "merge")
