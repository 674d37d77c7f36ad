"""``hpcl data``: images before a run."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path, PurePath
from typing import Annotated

import typer

from hpcl.errors import UserError, harmless

data_app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


@data_app.callback()
def _data() -> None:
    """Look at images, and convert them into one file that is mapped."""


@data_app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Images, as for --data of other commands.")],
    out: Annotated[Path, typer.Argument(help="The Arrow file to write, such as mine.arrow.")],
    size: Annotated[
        int | None,
        typer.Option(min=8, max=1024, help="Side in pixels to which images are resized and cut; default: as it is."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that this command did not write.")] = False,
) -> None:
    """Decode images into one file, once for all machines; the same command goes on where it was cut off."""
    from hpcl.data import load
    from hpcl.data.convert import convert_file
    from hpcl.files import bytes_in_words
    from hpcl.sections import Data

    stored, there = convert_file(source, out, size, force=force)
    del stored
    if there:
        print(harmless(f"{out} is up to date"))
    print(harmless(f"{load(Data(source=str(out))).describe()}; {bytes_in_words(out.expanduser().stat().st_size)}"))


@data_app.command()
def check(
    source: Annotated[str, typer.Argument(help="As data.source: a folder, a file, or mnist5k.")],
    size: Annotated[int | None, typer.Option(min=1, help="As data.size; tells which images are smaller.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Contact sheet (PNG); a list of all findings (.txt) goes beside it.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="End with 1 if anything at all was found.")] = False,
) -> None:
    """Decode every image once: counts, classes, a contact sheet, and all that was left out, changed or is double."""
    from hpcl.files import may_write, write_text
    from hpcl.sources.check import check as look
    from hpcl.sources.check_text import MARK, lines
    from hpcl.sources.sheet import write_sheet

    root = None
    with suppress(OSError, RuntimeError):  # what is no path is told by the check
        whole = Path(source).expanduser().resolve()
        root = whole if whole.is_dir() else None
    here = root.parent if root is not None and Path.cwd().is_relative_to(root) else Path()
    sheet = out or here / f"{PurePath(root or source).stem[:80] or 'data'}_check.png"
    if sheet.suffix.lower() != ".png":
        raise UserError(f"--out is {sheet}, but must end with .png")
    if root is not None and sheet.absolute().parent.resolve().is_relative_to(root):
        raise UserError(f"--out is {sheet}, within {source}, whose images it would be one of; name a file elsewhere")
    listed = sheet.with_suffix(".txt")
    for file in (sheet, listed):
        may_write(file, MARK, "hpcl data check", "name another file with --out")

    terminal = sys.stderr.isatty()

    def progress(done: int) -> None:
        print(f"\r{done:,} images looked at", end="", file=sys.stderr, flush=True)

    try:
        checked = look(source, size, progress if terminal else None)
    finally:
        if terminal:
            print("\r\x1b[K", end="", file=sys.stderr)
    for line in lines(checked):
        print(line)
    write_text(listed, "\n".join(lines(checked, None)) + "\n")
    if checked.pictures:
        write_sheet(checked, sheet)
        print(harmless(f"contact sheet: {sheet}"))
    print(harmless(f"all findings: {listed}"))
    if checked.unusable:
        raise UserError(*checked.unusable)
    if strict and checked.found:
        kinds = ", ".join(f"{len(entries):,} {kind}" for kind, entries in sorted(checked.findings.items()))
        print(f"--strict: {kinds}", file=sys.stderr)
        raise typer.Exit(1)
