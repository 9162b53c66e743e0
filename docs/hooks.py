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
    return markdown.replace(KNOBS, f'<div class="knobs" markdown>\n\n{reference_table()}\n</div>')


def reference_table() -> str:
    """A Markdown table of all knobs: name, default, methods, description."""
    from capruner.config import ALL, knobs  # here: it imports torch

    lines = ["| knob | default | methods | |", "|---|---|---|---|"]
    for knob in knobs().values():
        methods = "all" if knob.methods == ALL else ", ".join(knob.methods)
        text = knob.help.replace("|", "\\|")
        lines.append(f"| `{knob.name}` | `{knob.default!r}` | {methods} | {text} |")
    return "\n".join(lines) + "\n"
