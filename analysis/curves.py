"""Draw the curves of a search: who was stopped where, and how the clusters grew.

    python analysis/curves.py results/<name> [--metric acc_proto] [--out picture.png]

Reads the tables of the results folder; needs neither ray nor torch.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hpcl.analysis.charts.curves import curves
from hpcl.errors import UserError
from hpcl.files import atomic_path, may_write
from hpcl.results import load_search

_BEGIN = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}
"""How files of each kind begin: only such a one is overwritten."""


def draw(folder: Path, out: Path, metric: str | None = None) -> None:
    """Write the picture of a results folder.

    Raises:
        UserError: the folder is none of a search, has no such curve, or `out` is no picture's name.
    """
    if out.suffix not in _BEGIN:
        raise UserError(f"--out is {out}, but must end in {', '.join(_BEGIN)}")
    may_write(out, _BEGIN[out.suffix], "analysis/curves.py", "name another file with --out")
    search = load_search(folder, metric=metric)
    shown = search.measured([search.about.metric or "acc_proto_ref", "clusters"])
    figure = curves(search, list(shown))
    with atomic_path(out) as temporary:
        figure.savefig(temporary, dpi=130, format=out.suffix.removeprefix("."))


def main() -> int:
    """The command line; 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(description="Draw the curves of a search.")
    parser.add_argument("folder", type=Path, help="results/<name>")
    parser.add_argument("--metric", help="curve to draw; default: the one ASHA watched")
    parser.add_argument("--out", type=Path, help="PNG, SVG or PDF; default: curves.png in the results folder")
    options = parser.parse_args()
    out = options.out or options.folder / "curves.png"
    try:
        draw(options.folder, out, options.metric)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
