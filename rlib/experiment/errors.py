"""Mistakes that a user can make, each told in one line."""

import difflib
from collections.abc import Iterable


class UsageError(Exception):
    """Something the user asked for cannot be; the message is one line that says what would."""


class Stopped(BaseException):
    """Ctrl-C or SIGTERM, raised where everything done so far is safe."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


def unknown(kind: str, given: str, options: Iterable[str]) -> UsageError:
    """An error for a name that does not exist, with the nearest that does.

    >>> print(unknown("preset", "smok", ["default", "smoke"]))
    unknown preset 'smok'; did you mean 'smoke'? There are: default, smoke
    """
    names = sorted(options)
    close = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return UsageError(f"unknown {kind} {given!r}{hint} There are: {', '.join(names)}")
