"""Make tiny.json anew: the curve of the tiny run of conftest.py (run from the repository's root)."""

import json
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from conftest import TINY  # noqa: E402 - sets the thread count before torch comes in

from hpcl import Config, fit  # noqa: E402

COLUMNS = ("epoch", "stage", "clusters", "grew", "loss", "loss_inst", "loss_proto", "nce_ref")

rows = fit(Config.model_validate(TINY), tempfile.mkdtemp()).rows
text = json.dumps([{name: row.get(name) for name in COLUMNS} for row in rows], indent=1)
(HERE / "tiny.json").write_text(text + "\n")
print(text)
