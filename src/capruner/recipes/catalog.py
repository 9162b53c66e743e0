"""The recipes that come with the package, by name: ``one_shot/cap/vit``."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from capruner.cli.arguments import UserError


def shipped() -> dict[str, Path]:
    """``{name: file}``, names like ``one_shot/cap/vit``."""
    root = Path(str(files("capruner.recipes") / "shipped"))
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.rglob("*.yaml"))}


def locate(recipe: str) -> str:
    """The path of ``recipe``, which is a path itself or the name of a shipped recipe; an existing file wins."""
    if Path(recipe).is_file():
        return recipe
    return str(shipped().get(recipe.removesuffix(".yaml"), recipe))


def find(name: str) -> Path:
    """The file of a shipped recipe's name, or a recipe file; raise ``UserError`` if there is neither."""
    path = Path(locate(name))
    if path.is_file():
        if path.suffix not in (".yaml", ".md"):
            raise UserError(f"{name} is no recipe: SparseML reads .yaml, and .md with YAML in front")
        return path
    short = name.removesuffix(".yaml").rpartition("/")[2]
    near = [other for other in shipped() if short in other][:4]
    raise UserError(
        f"there is no recipe {name!r}, neither as a file nor shipped{'; near: ' + ', '.join(near) if near else ''}; see 'capruner recipes list'"
    )


def headline(path: Path) -> str:
    """The first sentence of a recipe's comment."""
    words: list[str] = []
    for text in path.read_text(encoding="utf-8").splitlines():
        if not text.startswith("#"):
            break
        words.append(text.lstrip("# ").strip())
        if text.rstrip().endswith("."):
            break
    return " ".join(words).partition(". ")[0].rstrip(".:")
