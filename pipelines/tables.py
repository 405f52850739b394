"""The README's tables, made of the results in ``pipelines/results/``, so that they cannot drift.

    python pipelines/tables.py            # writes them
    python pipelines/tables.py --check    # ends with 1 where the README differs

A table stands between ``<!-- table: NAME -->`` and ``<!-- end of table -->``, and comes from ``pipelines/results/NAME.json``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ablations.tables import marked, read_results, with_tables

from emloc_ray.errors import EmlocError

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "pipelines" / "results"


def main() -> int:
    """Writes or checks the README."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    readme = ROOT / "README.md"
    text, results = readme.read_text(), read_results(RESULTS)
    try:
        made = with_tables(text, results)
    except EmlocError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    untold = sorted(results.keys() - marked(text))
    for name in untold:
        print(f"pipelines/results/{name}.json has no table in the README yet.", file=sys.stderr)
    if arguments.check:
        if made != text:
            print("README.md differs from pipelines/results: run python pipelines/tables.py.", file=sys.stderr)
        return int(made != text or bool(untold))
    readme.write_text(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
