"""Parts of the documentation site that are generated when it is built."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

KNOBS = "<!-- knobs -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the table of all knobs where a page asks for it."""
    if KNOBS not in markdown:
        return markdown
    from capruner.config import reference_table  # here: it imports torch

    return markdown.replace(KNOBS, f'<div class="knobs" markdown>\n\n{reference_table()}\n</div>')
