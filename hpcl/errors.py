"""Mistakes of the user, told apart from bugs.

The command line prints a `UserError` without a traceback and exits with 2;
every other exception is a bug and keeps its traceback.
"""

from __future__ import annotations


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
        return tuple(str(problem) for problem in self.args)

    def __str__(self) -> str:
        return "\n".join(self.problems)


class ConfigError(UserError):
    """A configuration, space file or command-line override that cannot be used."""
