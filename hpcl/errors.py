"""Mistakes of the user, told apart from bugs.

The command line prints a `UserError` without a traceback and exits with 2;
every other exception is a bug and keeps its traceback.
"""

from __future__ import annotations


def harmless(text: str) -> str:
    """The text with all control characters written out, such as ``\\x1b``.

    Names of files, reasons and notes may come from others; printed like this they cannot colour,
    hide or overwrite what stands in the terminal.

    Example:
        >>> harmless("a\\x1b[31m b\\u202e")
        'a\\\\x1b[31m b\\\\u202e'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


_SHOWN = 50
"""Problems that are printed."""


class UserError(Exception):
    """One or more mistakes to be mended by the user, each a sentence that says where, what and what to do.

    Args:
        problems: one sentence each, best as "file:line:column: path is X, but must be Y".
    """

    def __init__(self, *problems: str) -> None:
        super().__init__(*problems)

    @property
    def problems(self) -> tuple[str, ...]:
        """The sentences, in the order given."""
        return tuple(harmless(str(problem)) for problem in self.args)

    def __str__(self) -> str:
        more = [f"and {len(self.args) - _SHOWN} more problems"] if len(self.args) > _SHOWN else []
        return "\n".join([*self.problems[:_SHOWN], *more])


class ConfigError(UserError):
    """A configuration, space file or command-line override that cannot be used."""


class StorageError(UserError):
    """Results cannot be written or read just now: a full disk, a mount or bucket that has gone.

    A run or search that meets it has lost nothing that was written, and goes on when the storage is back.
    """


class TakenOver(UserError):
    """Another process trains in this folder since, so this one must write nothing more there."""


class UnreadableCheckpoint(UserError):
    """A checkpoint file that is damaged, or of another kind."""
