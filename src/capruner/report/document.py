"""The frame of a report, and its parts: plain HTML that loads nothing, reads on a phone, aloud, and by day and night."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from html import escape
from importlib.resources import files
from typing import Any


@cache
def _style() -> str:
    return files("capruner.report").joinpath("style.css").read_text(encoding="utf-8")


def document(title: str, summary: str, figures: str, notes: Sequence[str], sections: Mapping[str, str]) -> str:
    """The whole document.

    Args:
        title, summary, notes: text; escaped here.
        figures: HTML below the summary.
        sections: HTML by heading; what is empty is left out.
    """
    found = [(heading.lower().replace(" ", "-"), heading, body) for heading, body in sections.items() if body]
    toc = "".join(f'<li><a href="#{identity}">{escape(heading)}</a></li>' for identity, heading, _ in found)
    body = "".join(
        f'<section id="{identity}" aria-labelledby="h-{identity}"><h2 id="h-{identity}">{escape(heading)}</h2>{text}</section>'
        for identity, heading, text in found
    )
    soft = "".join(f"<p class=soft>{escape(note)}</p>" for note in notes)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # The browser itself sees to it that nothing is loaded.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{_style()}</style></head><body><header><h1>{escape(title)}</h1>"
        f'<p>{escape(summary)}</p>{figures}{soft}<nav aria-label="Sections"><ul>{toc}</ul></nav></header>'
        f"<main>{body}</main></body></html>\n"
    )


def key_figures(figures: Sequence[tuple[str, str]], heading: str = "") -> str:
    """Boxes of ``(text, value)``."""
    boxes = "".join(f"<div><dt>{escape(text)}</dt><dd>{escape(value)}</dd></div>" for text, value in figures)
    return (f"<p>{escape(heading)}</p>" if heading else "") + f'<dl class="key">{boxes}</dl>'


def table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]], style: str = "") -> str:
    """``rows`` of cells that are HTML already, ``columns`` text; the first cell of each row names it."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "".join(
        f'<tr><th scope="row">{cells[0]}</th>{"".join(c if c.startswith("<td") else f"<td>{c}</td>" for c in cells[1:])}</tr>'
        for cells in rows
    )
    return scrolling(caption, head, body, style)


def scrolling(caption: str, head: str, body: str, style: str) -> str:
    """A table that scrolls on its own; ``head`` and ``body`` are HTML already."""
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}"><table{style}><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def bar(share: float, what: str) -> str:
    """A cell with a bar as wide as ``share`` of it; ``what``: read aloud."""
    return f'<td class="share"><span class="bar" style="width:{100 * share:.1f}%" role="img" aria-label="{escape(what)}"></span></td>'


def number(value: float | None, form: str = ".2f") -> str:
    """A dash for what was not measured."""
    return "–" if value is None else format(value, form)


def facts(caption: str, found: Mapping[str, Any]) -> str:
    """A table of names and values, closed if it is long; values of None are left out."""
    rows = [[breakable(str(key)), escape(_plain(value))] for key, value in found.items() if value is not None]
    listed = table(caption, ["name", "value"], rows, ' class="facts"') if rows else ""
    return f"<details><summary>{caption}: {len(rows)}</summary>{listed}</details>" if len(rows) > 30 else listed


def given(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that say something: neither empty nor switched off."""
    return {key: value for key, value in arguments.items() if value is not False and value not in (None, "", [], {})}


def breakable(name: str) -> str:
    """A dotted name that may wrap after dots and underscores, escaped."""
    return escape(name).replace(".", ".<wbr>").replace("_", "_<wbr>")


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={item}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value)
