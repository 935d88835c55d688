"""The one exception family whose message is meant for the person at the keyboard.

Everything that a user can cause (a wrong path, a wrong name, a damaged file) raises `VssError` with one sentence that
says what came, what was expected and what to do. The command line prints the sentence and exits with `exit_code`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VssError(ValueError):
    """Bad input: one clear sentence, exit code 2."""

    exit_code = 2


class GateFailed(VssError):
    """The input was fine and the result is not good enough: exit code 1."""

    exit_code = 1


def unknown(kind: str, name: str, known: Iterable[str]) -> VssError:
    """The error for a name that does not exist: names the closest match and lists what there is."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return VssError(f"unknown {kind} {name!r}.{hint} Known: {', '.join(known) or 'none'}.")
