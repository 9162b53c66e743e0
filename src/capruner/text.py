"""Text for terminals: tables, and foreign text made safe to print."""

from __future__ import annotations

from collections.abc import Sequence


def printable(text: str) -> str:
    """``text`` with control characters as escapes: printed raw, a name in a file could move the cursor or change the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def some(items: Sequence[object], most: int = 5) -> str:
    """The first ``most`` items, and how many more there are."""
    return ", ".join(map(str, items[:most])) + (f" and {len(items) - most} more" if len(items) > most else "")


def text_table(headings: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Columns as wide as they need, those in ``left`` flush left, the others flush right."""
    cells = [list(headings), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headings))]
    lines = []
    for row in cells:
        aligned = [cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))]
        lines.append("  ".join(aligned).rstrip())
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
