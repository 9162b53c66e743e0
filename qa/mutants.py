"""Do the tests notice? One small change at a time in a module of the method, and the tests that belong to it.

    python qa/mutants.py                                  # elimination, allocation and fisher
    python qa/mutants.py elimination --share 0.2 --seed 1         # a random fifth of the mutants
    python qa/mutants.py fisher --lines 100 140

Changed are comparisons, arithmetic, ``not``, ``and``/``or``, signs, numbers (by one), booleans, and statements (left out); not messages, annotations and
docstrings. The working tree stays as it is: a process that has torch loaded already forks one child per mutant, where the import system hands out the
changed module. A mutant counts as killed when a test fails or the time is up.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.util
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from typing import Any

import hypothesis  # noqa: F401 - loaded once, before the forks
import numpy  # noqa: F401
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
TESTS = {
    "elimination": [
        "core/test_kernels",
        "core/test_elimination",
        "core/test_parallel",
        "core/test_patterns",
        "test_pruning",
    ],
    "allocation": ["core/test_allocation", "test_pruning"],
    "fisher": ["core/test_fisher", "core/test_damping", "core/test_parallel", "test_pruning"],
}
"""In the order in which they are asked; the next file only when the one before saw nothing."""
SWAPPED: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult,
    ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
UNTOUCHED = (ast.Raise, ast.JoinedStr, ast.Import, ast.ImportFrom)


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """What one node could become."""
    new = copy.deepcopy(node)
    if isinstance(new, ast.Compare) and type(new.ops[0]) in SWAPPED:
        new.ops[0] = SWAPPED[type(new.ops[0])]()
        yield new
    elif isinstance(new, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(new.op) in SWAPPED:
        new.op = SWAPPED[type(new.op)]()
        yield new
    elif isinstance(new, ast.UnaryOp):
        yield new.operand
    elif isinstance(new, ast.Constant) and isinstance(new.value, bool):
        yield ast.Constant(not new.value)
    elif isinstance(new, ast.Constant) and isinstance(new.value, int | float):
        yield ast.Constant(new.value + 1)
    elif (isinstance(new, ast.Expr) and isinstance(new.value, ast.Call)) or isinstance(new, ast.Break | ast.Continue):
        yield ast.Pass()
    if isinstance(node, ast.AugAssign):
        yield ast.Pass()


def sites(tree: ast.AST) -> Iterator[tuple[ast.AST, str, int | None]]:
    """Every place that may change: the parent, its field, and the index in it."""
    for field, value in ast.iter_fields(tree):
        if field in ("annotation", "returns", "decorator_list") or isinstance(value, UNTOUCHED):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.AST) and not isinstance(child, UNTOUCHED):
                yield tree, field, index
                yield from sites(child)


def mutants(source: str) -> Iterator[tuple[int, str, ast.Module]]:
    """``(line, what was changed to what, the whole module)``."""
    for position in range(sum(1 for _ in sites(ast.parse(source)))):
        for variant in range(2):
            tree = ast.parse(source)
            parent, field, index = list(sites(tree))[position]
            value: Any = getattr(parent, field)
            node = value if index is None else value[index]
            found = list(changes(node))
            if variant >= len(found):
                continue
            new = ast.copy_location(found[variant], node)
            told = f"{ast.unparse(node)}  ->  {ast.unparse(new)}"
            if index is None:
                setattr(parent, field, new)
            else:
                value[index] = new
            yield getattr(node, "lineno", 0), told, ast.fix_missing_locations(tree)


class Changed(SourceFileLoader):
    """Loads a module from a tree instead of its file."""

    tree: ast.Module

    def get_code(self, fullname: str) -> Any:
        return compile(self.tree, self.path, "exec")

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return importlib.util.spec_from_file_location(name, self.path, loader=self) if name == self.name else None


def survives(module: str, tree: ast.Module, seconds: int) -> bool:
    """Whether all tests pass with ``tree`` in place of the module."""
    child = os.fork()
    if child == 0:
        signal.alarm(seconds)  # kills: an endless loop has been noticed
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        loader = Changed(f"capruner.core.{module}", str(ROOT / "src" / "capruner" / "core" / f"{module}.py"))
        loader.tree = tree
        sys.meta_path.insert(0, loader)  # type: ignore[arg-type]
        flags = ["-x", "-q", "-W", "ignore", "-p", "no:cacheprovider", "-p", "no:randomly", "--hypothesis-seed=0"]
        status = 0
        for tests in TESTS[module]:
            # Without the kernels for GPUs: in Triton's interpreter they take most of the time, and are no part of these modules.
            status = status or pytest.main(
                [*flags, "-m", "not slow", "-k", "not cuda", str(ROOT / "tests" / f"{tests}.py")]
            )
        os._exit(int(status != 0))
    return os.waitpid(child, 0)[1] == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", choices=[*TESTS, []], default=list(TESTS))
    parser.add_argument("--share", type=float, default=1.0, help="of the mutants, drawn at random")
    parser.add_argument("--lines", type=int, nargs=2, default=[0, 10**6], help="only those of these lines")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.chdir(ROOT)
    torch.set_num_threads(1)
    for module in args.modules:
        source = (ROOT / "src" / "capruner" / "core" / f"{module}.py").read_text()
        began = time.monotonic()
        if not survives(module, ast.parse(source), 600):
            raise SystemExit(f"the tests of {module} fail without any change")
        limit = 20 + 4 * int(time.monotonic() - began)
        draw = random.Random(args.seed)
        chosen = [m for m in mutants(source) if args.lines[0] <= m[0] <= args.lines[1] and draw.random() < args.share]
        alive = 0
        for line, told, tree in chosen:
            if survives(module, tree, limit):
                alive += 1
                print(f"survived  {module}.py:{line}  {told}", flush=True)
        killed = len(chosen) - alive
        print(
            f"{module}: {killed} of {len(chosen)} mutants killed, {100 * killed / max(1, len(chosen)):.1f} %",
            flush=True,
        )


if __name__ == "__main__":
    main()
