"""Which curve should stop trials? Random configurations, all trained to their end, and the audit of their curves.

    python benchmarks/curves.py                                       # the embedded digits
    python benchmarks/curves.py --data PATH/cifar10 --subset 0.1      # any labelled images

Draws configurations at random from search_spaces/full.yaml (lengths, learning rates, clusters, losses), stops none, and
so knows for every trial what each curve said early and what came of it. The evidence for `search.metric` in
docs/audit.md was made by this script; what it leaves in results/ is an ordinary results folder.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hpcl.errors import UserError
from hpcl.search.space import Space, from_tree
from hpcl.yamlio import Tree, load_tree

HERE = Path(__file__).resolve().parent


def space_of(options: argparse.Namespace) -> Space:
    """The shipped full space on these images: random trials, none stopped early."""
    tree = load_tree(HERE.parent / "search_spaces" / "full.yaml").value
    meters = {"knn_every": 1}
    if options.data is None:
        base = {"preset": "embedded", "meters": meters}
    else:  # a small network for a CPU, and the augmentation of coloured images, which is the default
        base = {
            "data": {"source": options.data, "subset": options.subset},
            "model": {"backbone": "convnet"},
            "optimizer": {"batch": 128},
            "moco": {"queue": 1024},
            "stages": {"total": options.epochs},
            "meters": {**meters, "views": 500},
        }
    search = {"trials": options.trials, "sampler": "random", "grace": None, "seed": options.seed}
    return from_tree(Tree({"base": base, "space": tree["space"], "search": search}), name=options.name)


def main() -> int:
    """The command line; 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", metavar="SOURCE", help="labelled images; default: the embedded digits")
    parser.add_argument("--subset", type=float, default=1.0, help="part of the training images (with --data)")
    parser.add_argument("--epochs", type=int, default=20, help="epochs of a trial (with --data)")
    parser.add_argument("--trials", type=int, default=40, help="random configurations (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the draw")
    parser.add_argument("--name", default="curves", help="name of the results folder")
    parser.add_argument("--results", default="results", help="folder of all results")
    options = parser.parse_args()
    from hpcl.search.runner import run

    try:
        found = run(space_of(options), name=options.name, results=options.results)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    from hpcl.analysis.audit import audit
    from hpcl.results import load_search

    print("\n".join(audit(load_search(found.folder)).lines()))
    print(f"\nthe charts: hpcl report {found.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
