"""How fast images are decoded into the file that is mapped: this package beside a plain loop over Pillow.

    python benchmarks/data.py FOLDER                 # a folder of images, such as JPEGs in folders of classes
    python benchmarks/data.py FOLDER --size 84 --repeats 5

Prints images per second of CPU time (user and system, of all threads) and per second of wall time, mean and standard
deviation of the repeats. `convert` is all of it: listing, decoding on all cores, the journal, the hash, the sums, the
file synced to disk. `Pillow` opens, converts to RGB, resizes and keeps each image in one thread, and writes nothing.
Both read the files once before, so that the disk is not measured.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from hpcl import sources
from hpcl.data.blocks import cores, decoded
from hpcl.data.convert import convert
from hpcl.errors import UserError


def plain_loop(files: list[Path], size: int | None) -> None:
    """What one would write without this package."""
    kept = []
    for file in files:
        try:
            with Image.open(file) as opened:
                image = opened.convert("RGB")
        except OSError:  # broken
            continue
        if size is not None and image.size != (size, size):
            image = ImageOps.fit(image, (size, size), method=Image.Resampling.BICUBIC)
        kept.append(np.asarray(image))


def decode_only(source: sources.Source, size: int | None) -> None:
    """Our decoding alone, on all cores; nothing is written."""
    for _ in decoded(sources.items(source), size):
        pass


def convert_all(source: sources.Source, size: int | None, folder: Path) -> None:
    """All of a conversion."""
    out = folder / "out.arrow"
    out.unlink(missing_ok=True)
    convert(source, size, out, "give another folder with --scratch")


def timed(function: Callable[[], None], repeats: int) -> tuple[list[float], list[float]]:
    """CPU seconds and wall seconds of each repeat."""
    cpu, wall = [], []
    for _ in range(repeats):
        cpu_before, wall_before = time.process_time(), time.perf_counter()
        function()
        cpu.append(time.process_time() - cpu_before)
        wall.append(time.perf_counter() - wall_before)
    return cpu, wall


def main() -> int:
    """The command line; 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="a folder of images")
    parser.add_argument("--size", type=int, help="side in pixels to which they are resized; default: as they are")
    parser.add_argument("--repeats", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--scratch", type=Path, help="folder to write into; default: the system's for temporary files")
    options = parser.parse_args()
    try:
        source = sources.find(options.folder)
        if source.kind != "folder":
            raise UserError(f"{options.folder}: is {source.kind}, but must be a folder of images")
        count = len(source.files)
        size = sum(len(file.read_bytes()) for file in source.files)
        with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
            ways = {
                "Pillow, one thread": lambda: plain_loop(list(source.files), options.size),
                "decoding alone": lambda: decode_only(source, options.size),
                "convert": lambda: convert_all(source, options.size, Path(folder)),
            }
            print(f"{count:,} images of {size / count / 1e3:.1f} kB, {cores()} cores, n = {options.repeats}")
            print(f"{'':<20}{'images / CPU s':>20}{'images / wall s':>20}")
            for name, way in ways.items():
                cells = [_shown([count / each for each in times]) for times in timed(way, options.repeats)]
                print(f"{name:<20}{cells[0]:>20}{cells[1]:>20}", flush=True)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _shown(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):,.0f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):,.0f}{spread}"


if __name__ == "__main__":
    raise SystemExit(main())
