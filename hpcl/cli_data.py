"""``hpcl data ...``: images before a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hpcl.errors import harmless

data_app = typer.Typer(no_args_is_help=True, help="Look at images, and convert them into one file that is mapped.")


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
    from hpcl.config import Data
    from hpcl.data import load
    from hpcl.data.convert import convert_file
    from hpcl.files import bytes_in_words

    stored, there = convert_file(source, out, size, force=force)
    del stored
    if there:
        print(harmless(f"{out} is up to date"))
    print(harmless(f"{load(Data(source=str(out))).describe()}; {bytes_in_words(out.expanduser().stat().st_size)}"))
