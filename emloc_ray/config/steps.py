"""The steps of a run by name, in order."""

# The names in the manifest and in the log.
STEP_NAMES = (
    "import",
    "data",
    "calibrate",
    "gradients",
    "allocate",
    "factorize",
    "refine",
    "heal",
    "finetune",
    "correct",
    "finish",
    "merge",
    "evaluate",
)
# The stages' verbs on the command line: each runs up to its last step.
VERBS = ("calibrate", "factorize", "heal", "finetune", "correct", "merge", "evaluate")
