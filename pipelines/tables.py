"""The tables of README.md and pipelines/README.md, made of ``pipelines/results/``, so that they cannot drift.

    python pipelines/tables.py            # writes them
    python pipelines/tables.py --check    # ends with 1 where a page differs

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
PAGES = (ROOT / "README.md", ROOT / "pipelines" / "README.md")


def main() -> int:
    """Writes or checks the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    texts, results = {page: page.read_text() for page in PAGES}, read_results(RESULTS)
    try:
        made = {page: with_tables(text, results) for page, text in texts.items()}
    except EmlocError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    missing = sorted(results.keys() - set().union(*map(marked, texts.values())))
    for name in missing:
        print(f"pipelines/results/{name}.json has no table in pipelines/README.md yet.", file=sys.stderr)
    if arguments.check:
        for page in PAGES:
            if made[page] != texts[page]:
                print(
                    f"{page.relative_to(ROOT)} differs from pipelines/results: run python pipelines/tables.py.",
                    file=sys.stderr,
                )
        return int(made != texts or bool(missing))
    for page, text in made.items():
        page.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
