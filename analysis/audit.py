"""Which curve to stop trials on: every curve at every rung against the final objective, in a table and a sentence.

    python analysis/audit.py results/<name> [--csv FILE]

Best on a search that stopped nothing (``grace: null``). Needs neither ray nor torch.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hpcl.analysis.audit import audit
from hpcl.analysis.text import one_line
from hpcl.errors import UserError
from hpcl.files import atomic_path, may_write, writing
from hpcl.results import load_search


def main() -> int:
    """The command line; 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(description="Which curve ranks the trials of a search early as they end?")
    parser.add_argument("folder", type=Path, help="results/<name>")
    parser.add_argument("--csv", type=Path, help="write the table of correlations there, too")
    options = parser.parse_args()
    try:
        if options.csv:
            may_write(options.csv, "metric,rung", "analysis/audit.py", "name another file with --csv")
        found = audit(load_search(options.folder))
        if options.csv:
            with writing(options.csv), atomic_path(options.csv) as temporary:
                found.table.to_csv(temporary, index=False)
    except UserError as error:
        print("\n".join(one_line(problem) for problem in error.problems), file=sys.stderr)
        return 2
    print("\n".join(found.lines()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
