"""The steps of a run by name, in order."""

STAGES = ("calibrate", "factorize", "heal", "finetune", "correct", "merge", "evaluate")
# Every step of a run in order: what is done before the stages, and what goes before a factorization by predictions.
STEPS = ("import", "data", "calibrate", "gradients", "allocate", *STAGES[1:])
# Beside the factors of an emulator: a few of each layer's eigenvalues.
SPECTRA = "spectra.json"
# What they leave is sums over all rows, with an index that says so.
SUMS = ("calibrate", "gradients")
# All their workers have to be there at once.
GROUPS = ("heal", "finetune")
# Their work is a bag of independent tasks, of which as many go at once as there is room for, with one result.
BAGS = ("allocate", "factorize", "correct", "merge")
