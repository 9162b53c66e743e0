"""``capruner recipes``: the recipes that come with the package, and what a recipe prunes in a given architecture."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from capruner.cli.arguments import UserError, add_model
from capruner.cli.tables import text_table
from capruner.recipes.catalog import find, headline, shipped

HELP = """\
List the recipes that come with capruner, show one, or check one against a timm model.

  list [WORD ...]             names and a line each; of those whose name or line has all the words
  show NAME                   print one
  lint RECIPE --model NAME    what it prunes in that architecture (built without weights), and whether its values can be; exit code 1 if not
"""
EXAMPLE = """\
examples:
  capruner recipes list one_shot vit
  capruner recipes show one_shot/cap/vit > my.yaml
  capruner recipes lint my.yaml --model deit3_small_patch16_224
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags."""
    parser.add_argument("action", choices=("list", "show", "lint"))
    parser.add_argument("what", nargs="*", metavar="NAME", help="a name as list prints it; for lint also a file")
    add_model(parser, used="for lint")
    parser.epilog = EXAMPLE


def run(args: argparse.Namespace) -> int:
    """Do it; 1 if lint finds something."""
    if args.action == "list":
        return _list(args.what)
    if len(args.what) != 1:
        raise UserError(
            f"capruner recipes {args.action} takes one recipe, got {len(args.what)}; 'capruner recipes list' names them"
        )
    path = find(args.what[0])
    if args.action == "show":
        print(path.read_text(encoding="utf-8"), end="")
        return 0
    if not args.model:
        raise UserError("capruner recipes lint needs --model: the timm architecture to check against")
    return _lint(path, args.model, args.model_kwargs)


def _list(words: list[str]) -> int:
    lines = {name: headline(path) for name, path in shipped().items()}
    chosen = {n: text for n, text in lines.items() if all(w.lower() in f"{n} {text}".lower() for w in words)}
    if not chosen:
        raise UserError(
            f"no recipe has {' and '.join(map(repr, words))} in its name or its line; 'capruner recipes list' shows all {len(lines)}"
        )
    width = max(map(len, chosen))
    for name, text in chosen.items():
        print(f"{name:<{width}}  {text}")
    return 0


def _lint(path: Path, model_name: str, kwargs: dict[str, Any]) -> int:
    from capruner.cli.lint import lint
    from capruner.report.architecture import architecture

    model = architecture(model_name, kwargs)
    found, problems = lint(path, model)
    total = sum(p.numel() for p in model.parameters())
    if found:
        rows = [[name, "×".join(map(str, p.shape)), f"{p.numel():,}"] for name, p in found.items()]
        print(text_table(["layer", "shape", "weights"], rows))
        weights = sum(p.numel() for p in found.values())
        print(
            f"\n{len(found)} layers, {weights:,} weights: {100 * weights / total:.1f} % of the {total:,} parameters of {model_name}"
        )
    for problem in problems:
        print(f"problem: {problem}")
    print(f"{path.name}: " + ("fits" if not problems else f"{len(problems)} problem{'s' * (len(problems) > 1)}"))
    return 1 if problems else 0
