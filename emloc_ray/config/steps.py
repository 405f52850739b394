"""The steps of a run by name, in order."""

# Every step, as the manifest and the log name it.
STEPS = (
    "import",
    "data",
    "calibrate",
    "gradients",
    "allocate",
    "factorize",
    "heal",
    "finetune",
    "correct",
    "merge",
    "evaluate",
)
# The verbs of the command line: each runs up to its last step.
VERBS = ("calibrate", "factorize", "heal", "finetune", "correct", "merge", "evaluate")
