"""Text from outside, made safe to print."""

from __future__ import annotations


def printable(text: str) -> str:
    """``text`` with control characters as escapes: printed raw, a name in a file could move the cursor or change the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
