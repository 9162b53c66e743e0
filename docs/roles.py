"""Docstrings for the documentation site: references, :func:`capruner.prune` for example, become links, and ``>>>`` lines blocks of code."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):`~?([\w.]+)`")
EXAMPLE = re.compile(r"^>>> .*\n?(?:.+\n?)*", re.MULTILINE)


class Roles(griffe.Extension):
    """Turn roles into links where the public API has the name, and into code elsewhere; fence examples."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        public = set(pkg.exports or ())
        for thing in _all(pkg):
            if thing.docstring is not None:
                text = ROLE.sub(lambda match: _link(match[1], public), thing.docstring.value)
                thing.docstring.value = EXAMPLE.sub(_fence, text)


def _link(name: str, public: set[str]) -> str:
    plain = name.removeprefix("capruner.")
    return f"[`{plain}`][capruner.{plain}]" if plain.split(".")[0] in public else f"`{name}`"


def _fence(match: re.Match[str]) -> str:
    lines = match[0].rstrip("\n").splitlines()
    code = [line[4:] if line.startswith((">>> ", "... ")) else f"# {line}" for line in lines]
    return "\n".join(["```python", *code, "```", ""])


def _all(thing: griffe.Object) -> list[griffe.Object]:
    """The object and everything that is defined in it."""
    inner = [member for member in thing.members.values() if not member.is_alias]
    return [thing, *(each for member in inner for each in _all(member))]
