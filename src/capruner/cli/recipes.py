"""``capruner recipes``: the recipes that come with the package, and what a recipe prunes in a given architecture."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from capruner.cli.arguments import UserError, add_model
from capruner.recipes.catalog import find, headline, shipped
from capruner.text import text_table

METHODS = ("cap", "fast_cap", "obs", "magnitude")

HELP = """\
List the recipes that come with capruner, show one, check one against a timm model, make one for a model, or convert one.

  list [WORD ...]             names and a line each; of those whose name or line has all the words
  show NAME                   print one
  lint RECIPE --model NAME    what it prunes in that architecture (built without weights), and whether its values are valid; exit code 1 if not
  make --model NAME           print a recipe that prunes the blocks of that architecture and leaves stem and head dense
  convert FILE                print a recipe of the original CAP repository, or of another SparseML, as one that loads here. What was changed, and what is
                              left to change by hand, goes to stderr; exit code 1 if something is left
"""
EXAMPLE = """\
examples:
  capruner recipes list one_shot vit
  capruner recipes show one_shot/cap/vit > my.yaml
  capruner recipes lint my.yaml --model deit3_small_patch16_224
  capruner recipes make --model regnety_032 --method cap --sparsity 0.75 > regnety.yaml
  capruner recipes make --model levit_256 --sparsity 0.9 --epochs 100 > levit.yaml
  capruner recipes convert '300ep_vit_sp=0.40_90.yaml' > vit.yaml
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("list", "show", "lint", "make", "convert"))
    parser.add_argument(
        "what", nargs="*", metavar="NAME", help="a name as list prints it; for lint also a file, for convert a file"
    )
    add_model(parser, used="for lint and make")
    made = parser.add_argument_group("make")
    made.add_argument("--method", choices=METHODS, default="cap", help="default cap")
    made.add_argument("--sparsity", type=float, default=0.5, help="share of weights to prune in the end (default 0.5)")
    made.add_argument(
        "--epochs",
        type=int,
        help="a training of N epochs that prunes every tenth of it, from half the sparsity at the start to all of it after 80 %% (default: one-shot)",
    )
    parser.epilog = EXAMPLE


def run(args: argparse.Namespace) -> int:
    """Do it; 1 if lint finds something."""
    if args.action == "list":
        return _list(args.what)
    if args.action == "make":
        return _make(args)
    if len(args.what) != 1:
        raise UserError(
            f"capruner recipes {args.action} takes one recipe, got {len(args.what)}; 'capruner recipes list' names them"
        )
    path = find(args.what[0])
    if args.action == "show":
        print(path.read_text(encoding="utf-8"), end="")
        return 0
    if args.action == "convert":
        return _convert(path)
    if not args.model:
        raise UserError("capruner recipes lint needs --model: the timm architecture to check against")
    return _lint(path, args.model, args.model_kwargs)


def _make(args: argparse.Namespace) -> int:
    from capruner.recipes.make import make
    from capruner.report.architecture import architecture

    if args.what:
        raise UserError(f"capruner recipes make takes --model, no name; got {' '.join(args.what)}")
    if not args.model:
        raise UserError("capruner recipes make needs --model: the timm architecture to make a recipe for")
    if not 0 < args.sparsity < 1:
        raise UserError(f"--sparsity {args.sparsity:g}: must lie in (0, 1); write 0.9 for 90 %")
    if args.epochs is not None and args.epochs < 1:
        raise UserError(f"--epochs {args.epochs}: must be at least 1")
    model = architecture(args.model, args.model_kwargs)
    print(make(model, args.model, args.method, args.sparsity, args.epochs), end="")
    return 0


def _convert(path: Path) -> int:
    from capruner.recipes.convert import convert

    text, changes, problems = convert(path)
    print(text, end="")
    for change in changes:
        print(f"changed: {change}", file=sys.stderr)
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    return 1 if problems else 0


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
