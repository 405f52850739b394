"""EMLoC from Python: the same run as ``emloc-ray run CONFIG``, for notebooks and your own scripts.

python pipelines/emloc.py configs/quickstart.yaml finetune.max_steps=20
"""

from __future__ import annotations

import sys

import emloc_ray


def main() -> None:
    """Runs a config and prints the held-out losses."""
    config = emloc_ray.load_config(sys.argv[1], sys.argv[2:])
    metrics = emloc_ray.run(config)
    for variant, values in metrics["evaluation"].items():
        print(f"{variant:<18} {values['loss']:.4f}")


if __name__ == "__main__":
    main()
