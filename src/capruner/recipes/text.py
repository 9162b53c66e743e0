"""The text of a recipe, and what is refused before anybody reads it: a few lines of YAML can keep a machine busy for ever."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from capruner.cli.arguments import UserError

LARGEST = 1_000_000
DEEPEST, MOST_KEYS = 30, 1_000
MOST_VALUES = 100_000
"""Bytes of a recipe, and its values after each reference is replaced by what it refers to: references to references explode."""
_FRONT = re.compile(r"^\s*(?:---|\+\+\+)(.*?)(?:---|\+\+\+)", flags=re.DOTALL | re.MULTILINE)


def read(path: str | Path) -> str:
    """The text of a recipe, UTF-8 whatever the locale."""
    return Path(path).read_text(encoding="utf-8-sig")


def checked_text(path: str | Path) -> str:
    """The YAML of a recipe file, small enough to be read by any reader.

    Raises:
        UserError: no such file, neither .yaml nor .md, a .md without YAML in front, no text, or too much in it.
    """
    if not Path(path).is_file():
        raise UserError(
            f"--sparseml-recipe {path}: no such file, and no shipped recipe; 'capruner recipes list' names those"
        )
    if Path(path).stat().st_size > LARGEST:
        raise UserError(f"{path} has more than {LARGEST:,} bytes; that is no recipe")
    try:
        text = _yaml_of(path, read(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not YAML: it is no text ({error.reason} at byte {error.start})") from error
    _check_size(path, text)
    if _expanded_size(text) > MOST_VALUES:
        raise UserError(
            f"{path}: its references (*name) make it more than {MOST_VALUES:,} values, or refer to themselves; write fewer"
        )
    return text


def stored_text(path: str | Path) -> str:
    """What to write as ``recipe.yaml`` beside a run: the file as it is; of a Markdown recipe the YAML in front."""
    return checked_text(path) if Path(path).suffix.lower() == ".md" else read(path)


def modifier_names(text: str) -> list[str]:
    """Names of the modifiers (``!Name``) in the YAML of a recipe, in its order."""
    return [t.value[1] for t in _tokens(text) if isinstance(t, yaml.TagToken) and t.value[0] == "!"]


def _yaml_of(path: str | Path, text: str) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in (".yaml", ".md"):
        raise UserError(f"{path}: recipes are .yaml, or .md with YAML in front")
    if suffix == ".yaml":
        return re.sub(r"^---(?=\s|$)", "", text, flags=re.MULTILINE)  # else SparseML would look for a Markdown front
    front = _FRONT.search(text)
    if front is None:
        raise UserError(f"{path} has no YAML in front, between two lines of ---")
    return front[1]


def _check_size(path: str | Path, text: str) -> None:
    """Raise ``UserError`` for deep nesting, and for too many keys or values: YAML readers take quadratic time or more for them."""
    depth = keys = 0
    for count, token in enumerate(_tokens(text)):
        depth += isinstance(token, _OPENING) - isinstance(token, _CLOSING)
        keys += isinstance(token, yaml.KeyToken)
        if depth > DEEPEST:
            raise UserError(f"{path} nests more than {DEEPEST} levels deep; that is no recipe")
        if keys > MOST_KEYS or count > 20 * MOST_KEYS:
            raise UserError(
                f"{path} has more than {MOST_KEYS:,} keys or {20 * MOST_KEYS:,} YAML tokens; that is no recipe"
            )


_OPENING = (
    yaml.BlockSequenceStartToken,
    yaml.BlockMappingStartToken,
    yaml.FlowSequenceStartToken,
    yaml.FlowMappingStartToken,
)
_CLOSING = (yaml.BlockEndToken, yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken)


def _expanded_size(text: str) -> float:
    """Number of values of a YAML document when each reference is replaced by what it refers to; infinite for one that contains itself."""
    sizes: dict[str, float] = {}
    nested: list[tuple[str | None, float]] = [(None, 0)]
    with suppress(yaml.YAMLError):  # whoever reads it will say what is wrong with it
        for event in yaml.parse(text):
            if isinstance(event, yaml.CollectionStartEvent):
                nested.append((event.anchor, 1))
                if event.anchor:
                    sizes[event.anchor] = math.inf
                continue
            if isinstance(event, yaml.CollectionEndEvent):
                anchor, size = nested.pop()
            elif isinstance(event, yaml.AliasEvent):
                anchor, size = None, sizes.get(str(event.anchor), 1)
            elif isinstance(event, yaml.ScalarEvent):
                anchor, size = event.anchor, 1
            else:
                continue
            if anchor:
                sizes[anchor] = size
            nested[-1] = (nested[-1][0], nested[-1][1] + size)
    return sum(size for _, size in nested)


def _tokens(text: str) -> Iterator[Any]:
    with suppress(yaml.YAMLError):  # whoever reads it will say what is wrong with it
        yield from yaml.scan(text)
