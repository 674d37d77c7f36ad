"""All files below a folder, once, so that every form of source looks at the same list."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpcl.sources.source import Source, fingerprint

IMAGE_ENDINGS = {
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm",
    ".avif", ".jp2",
}  # fmt: skip

LEFT_BY_SYSTEMS = {"thumbs.db": "a thumbnail store of Windows", "desktop.ini": "a setting of Windows"}


@dataclass
class Tree:
    """What lies below a folder. Links to folders are not followed: they may lead back up."""

    root: Path
    images: list[Path] = field(default_factory=list)
    """Files whose names end as images' do: a folder's files first, then its folders, each by name."""
    others: list[Path] = field(default_factory=list)
    """All other files, in the same order."""
    folders: list[str] = field(default_factory=list)
    """Every folder below, as :meth:`name` gives it."""
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """Entries that cannot be read, with the reason."""
    litter: list[tuple[str, str]] = field(default_factory=list)
    """Hidden entries and what other systems leave behind, with what each is."""

    def name(self, path: str | Path) -> str:
        """The path below the root, with slashes."""
        return Path(path).relative_to(self.root).as_posix()

    def ending(self, *endings: str) -> list[Path]:
        """The other files whose names end so."""
        return [path for path in self.others if path.suffix.lower() in endings]

    def source(
        self,
        kind: str,
        files: Iterable[Path],
        others: Iterable[str],
        *,
        skipped: Iterable[tuple[str, str]] = (),
        path: Path | None = None,
        lists: Iterable[Path] = (),
        **more: Any,
    ) -> Source:
        """The folder as a source.

        Args:
            kind: of it.
            files: that are read.
            others: names of those that are not.
            skipped: entries that give no image beside those of the folder itself.
            path: of the source, where it is not the folder.
            lists: other files that are read, and count for the fingerprint.
            more: other fields of :class:`hpcl.sources.source.Source`.
        """
        files = tuple(files)
        return Source(
            kind,
            path or self.root,
            files,
            fingerprint(self.root, [*files, *lists]),
            skipped=(*self.skipped, *skipped),
            others=tuple(others),
            litter=tuple(self.litter),
            **more,
        )


def walk(root: Path) -> Tree:
    """Lists a folder; opens no file."""
    tree = Tree(root)

    def refused(error: OSError) -> None:
        tree.skipped.append((tree.name(error.filename), f"cannot be listed: {error.strerror}"))

    for folder, subfolders, files in os.walk(root, onerror=refused, followlinks=False):
        kept = []
        for name in sorted(subfolders):
            path = Path(folder, name)
            if name.startswith((".", "__MACOSX")):
                tree.litter.append((f"{tree.name(path)}/", _litter_folder(path)))
            elif path.is_symlink():
                tree.skipped.append((tree.name(path), "link to a folder, not followed"))
            else:
                kept.append(name)
                tree.folders.append(tree.name(path))
        subfolders[:] = kept
        for name in sorted(files):
            _file(tree, Path(folder, name))
    return tree


def _file(tree: Tree, path: Path) -> None:
    name = path.name
    if name.startswith("._"):
        tree.litter.append((tree.name(path), "what a Mac keeps beside a file, no image (._ file)"))
    elif name.startswith("."):
        tree.litter.append((tree.name(path), "hidden file"))
    elif name.lower() in LEFT_BY_SYSTEMS:
        tree.litter.append((tree.name(path), LEFT_BY_SYSTEMS[name.lower()]))
    else:
        try:
            regular = stat.S_ISREG(path.stat().st_mode)
        except OSError as error:
            tree.skipped.append((tree.name(path), f"cannot be opened: {error.strerror}"))
            return
        if not regular:
            tree.skipped.append((tree.name(path), "not a regular file"))
        else:
            (tree.images if path.suffix.lower() in IMAGE_ENDINGS else tree.others).append(path)


def _litter_folder(path: Path) -> str:
    count = sum(len(files) for _, _, files in os.walk(path, followlinks=False))
    kind = "what a Mac's archive leaves, no images" if path.name.startswith("__MACOSX") else "hidden folder"
    return f"{kind} ({count:,} {'file' if count == 1 else 'files'})"
