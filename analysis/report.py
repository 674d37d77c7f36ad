"""Write the report of one or several searches, as ``hpcl report`` does.

    python analysis/report.py results/<name> [more ...] [--out report.html]

Reads the tables of the results folders; Ray need not run.
"""

import sys

from hpcl.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["report"]
    main()
