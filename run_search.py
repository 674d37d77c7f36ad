"""Search a space of configurations: ``python run_search.py --space search_spaces/clusters.yaml``."""

from hpcl.search.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
