# ruff: noqa: E501 (a table is easier to read in long lines; the cases of a loop are tried before the next turn)
"""Some hundred things that people give to a pruner by mistake: each must be refused in words, and leave the model as it was.

    python qa/bad_inputs.py            # a table by class; every failure by name
    python qa/bad_inputs.py --show     # every input with the error given

Counts tracebacks (errors of another kind than the documented ones), silent successes, and models that were changed. All must be 0.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import itertools
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import capruner

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
NAN, INF = float("nan"), float("inf")
ALLOWED = (ValueError, OSError, capruner.distributed.PeerError)
"""What the interface documents; anything else is a traceback that nobody can act on."""


@dataclass
class Case:
    """One bad input. ``attempt`` is to raise; ``model`` must not change."""

    kind: str
    name: str
    attempt: Callable[[], object]
    model: nn.Module | None = None


@dataclass
class Outcome:
    """What came of it: ``refused``, ``traceback``, ``silent`` or ``changed``, and the error's words."""

    case: Case
    verdict: str
    words: str


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


def data(count: int = 8) -> list[tuple[Any, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(4, 3, 4, 4, generator=generator), torch.randint(3, (4,), generator=generator))
        for _ in range(count)
    ]


KNOWN: dict[str, Any] = {"num_grads": 8, "fisher_block_size": 8, "damp": 1e-3, "progress": False}
NO_NUMBER = ["many", "", None, [], {}, object(), (1,), b"3", 1j]
NO_COUNT = [0, -1, 1.5, NAN, INF, True, False, "8", [8], {}, b"8", 1j, torch.tensor([1.0, 2.0])]


def arguments() -> Iterator[Case]:
    """Of ``capruner.prune``."""
    table: dict[str, list[Any]] = {
        "num_grads": [*NO_COUNT, None, -9, [9]],
        "fisher_block_size": NO_COUNT,
        "blocks_in_parallel": NO_COUNT,
        "num_recomputations": [*NO_COUNT, None],
        "distill_passes": [-1, NAN, INF, True, False, "8", [8], {}, b"8", 1j, None],
        "damp": [0, -1e-8, NAN, INF, -INF, "much", "", [], {}, True, 1j],
        "sparsity": [1, 1.0, 1.5, -0.1, NAN, INF, 50, 90, "half", "", [], [0.5, 1.5], [0.5, "x"], [None], None, {}, {0.5: []}, {"x": ["3.weight"]}, {2: ["3.weight"]}, {0.5: ["no.weight"]}, True, 1j],
        "method": ["capp", "", None, 3, "CAP", ["cap"], {}],
        "params": ["nothing", "", [], None, 3, ["3.weight", "x"], ["re:("], ["re:nothing"], "re:^$", [3], [None], ["0.bias", 5], {"a": 1}, ["__ALL__", "x"]],
        "mask_type": ["3:2", "0:4", "4:4", "2:", ":4", "two:four", "", None, "block", "block0", "block-4", -1, 1.5, [2, 4], {}, "2:4:8", "1:1000"],
        "gradients": ["batches", "", None, 3, [], {}],
        "labels": ["none", "", None, 3, [], {}],
        "score": ["margin", "", None, 3, [], {}],
        "solver": ["cholesky", "", None, 3, [], {}],
        "recomputation_inter_func": ["quadratic", "", None, 3, []],
        "on_bad_batch": ["ignore", "", None, 3, [], {}],
        "memory_budget": ["8 potatoes", "", "-1GiB", "1KiB", 0, -5, 1.5, [], {}, "GiB", True],
        "fisher_inv_device": ["gpu", "cuda:99", "", 3.5, [], {}],
        "masks": ["all", 3, [], {"3.weight": torch.ones(2, 2)}, {"nothing": torch.ones(8, 16)}, {"3.weight": None}, {"3.weight": "x"}, {3: torch.ones(8, 16)}],
        "state_dir": ["", "\0", 3, [], {}, "/proc/nowhere", "/dev/null/state"],
        "relative_damp": ["yes", None, 3, []],
        "global_sparsity": ["yes", None, 3, []],
        "skip_unsupported": ["yes", None, 3, []],
        "progress": ["yes", None, 3],
    }  # fmt: skip
    for name, values in table.items():
        for value in values:
            model = net()
            more = {"sparsity": 0.5} | KNOWN | {name: value}
            if name == "solver":
                more["num_grads"] = 4
            if name == "block_size":
                more["method"] = "fast_cap"

            def attempt(model: nn.Module = model, more: dict[str, Any] = more) -> object:
                return capruner.prune(model, data(), nn.functional.cross_entropy, **more)

            yield Case("arguments", f"{name}={value!r}"[:70], attempt, model)
    for value in [*NO_COUNT, 9]:
        model = net()
        yield Case(
            "arguments",
            f"block_size={value!r}"[:70],
            lambda model=model, value=value: capruner.prune(
                model,
                data(),
                sparsity=0.5,
                method="fast_cap",
                **KNOWN,
                mask_type="2:4",
                params=["3.weight"],
                block_size=value,
            ),
            model,
        )
    for more in (
        {"method": "fast_cap", "solver": "woodbury", "relative_damp": True, "num_recomputations": 0},
        {"solver": "woodbury", "relative_damp": True},
        {"mask_type": "2:4", "sparsity": 0.75},
        {"mask_type": "2:4", "num_recomputations": 2, "sparsity": 0.5, "params": ["3.weight"]},
        {"mask_type": "2:4", "fisher_block_size": 6, "sparsity": 0.5},
        {"mask_type": "block4", "params": ["0.weight"], "sparsity": 0.5},
        {"masks": {"3.weight": torch.zeros(8, 16)}, "sparsity": 0.1},
    ):
        model = net()
        given = KNOWN | {"sparsity": 0.5} | more
        yield Case(
            "arguments", f"together: {', '.join(more)}", lambda m=model, g=given: capruner.prune(m, data(), **g), model
        )


class Half(nn.Module):
    """Returns what it is told to."""

    def __init__(self, output: Callable[[Any], Any]) -> None:
        super().__init__()
        self.inner, self.output = net(), output

    def forward(self, x: Any) -> Any:
        return self.output(self.inner(x))


def tensors() -> Iterator[Case]:
    """Models, batches, losses."""
    plain = nn.functional.cross_entropy
    x, y = data(1)[0]

    def case(name: str, model: nn.Module, batches: Any = None, loss: Any = plain, **more: Any) -> Case:
        given = {"sparsity": 0.5} | KNOWN | more
        stream = data() if batches is None else batches
        return Case("tensors", name, lambda: capruner.prune(model, stream, loss, **given), model)

    for value, place in itertools.product((NAN, INF, -INF), ("0.weight", "3.bias", "5.weight")):
        model = net()
        model.get_parameter(place).data.view(-1)[0] = value
        yield case(f"{value} in {place}", model)
    for value, mode in itertools.product((NAN, INF, -INF), ("batch", "sample")):
        bad = data()
        bad[1][0][0, 0, 0, 0] = value
        yield case(f"{value} in an image, {mode}", net(), bad, gradients=mode)
    for name, batches in {
        "no batches": [], "None": None, "a number": 3, "a string": "data", "tensors alone": [x] * 8, "triples": [(x, y, y)] * 8, "singles": [(x,)] * 8,
        "dicts": [{"x": x, "y": y}] * 8, "None in it": [None] * 8, "numbers in it": [1, 2, 3], "strings in it": ["ab"] * 8, "lists of lists": [([], [])] * 8,
        "no targets": [(x, None)] * 8, "no inputs": [(None, y)] * 8, "too few": iter(data(5)), "an empty batch": [(x[:0], y[:0])] * 8,
        "wrong channels": [(x[:, :1], y)] * 8, "wrong size": [(x[..., :3], y)] * 8, "wrong rank": [(x[0, 0], y)] * 8, "integers": [(x.long(), y)] * 8,
        "doubles": [(x.double(), y)] * 8, "halves": [(x.half(), y)] * 8, "complex": [(x + 0j, y)] * 8, "strings as labels": [(x, ["a"] * 4)] * 8, "float labels": [(x, y.float())] * 8,
        "labels too large": [(x, y + 3)] * 8, "negative labels": [(x, y - 3)] * 8, "too few labels": [(x, y[:3])] * 8, "labels of rank 2": [(x, y[:, None])] * 8,
        "NaN labels": [(x, torch.full((4, 3), NAN))] * 8, "numpy": [(x.numpy(), y.numpy())] * 8, "sets": [({1, 2}, y)] * 8, "a dict of names": [({"image": x}, y)] * 8,
        "two inputs": [((x, x), y)] * 8, "a function": lambda: data(), "a class": list, "infinite zeros": itertools.repeat(0),
    }.items():  # fmt: skip
        for mode in ("batch", "sample") if name in ("numbers in it", "None in it", "an empty batch", "wrong channels", "no inputs", "too few labels", "labels too large") else ("batch",):  # fmt: skip
            yield case(f"batches: {name}, {mode}", net(), () if batches is None else batches, gradients=mode)
    for name, loss in {
        "None": None, "a string": "mse", "a number": 3, "per sample": lambda o, t: plain(o, t, reduction="none"), "a float": lambda o, t: 1.0, "None back": lambda o, t: None,
        "NaN": lambda o, t: plain(o, t) * NAN, "infinite": lambda o, t: plain(o, t) / 0, "detached": lambda o, t: plain(o, t).detach(), "a tuple": lambda o, t: (plain(o, t), 1),
        "one argument": lambda o: o.sum(), "three arguments": lambda o, t, u: o.sum(), "raises": lambda o, t: 1 // 0, "complex": lambda o, t: plain(o, t) * 1j,
        "a constant": lambda o, t: torch.tensor(1.0), "integers": lambda o, t: torch.tensor(1), "in place": lambda o, t: o.add_(1).sum().detach(), "a vector": lambda o, t: o[0],
    }.items():  # fmt: skip
        if name not in ("raises", "one argument", "three arguments", "None", "a string", "a number"):
            yield case(f"loss: {name}", net(), loss=loss)
    frozen = net().requires_grad_(False)
    halves, complex_ = net().half(), nn.Sequential(nn.Flatten(), nn.Linear(48, 3, dtype=torch.complex64))
    for name, model in {
        "no parameters": nn.Sequential(nn.Flatten()), "no prunable ones": nn.Sequential(nn.Flatten(), nn.LayerNorm(48)), "complex": complex_,
        "an unused layer": nn.ModuleDict({"a": nn.Linear(2, 2)}), "on meta": nn.Sequential(nn.Flatten(), nn.Linear(48, 3, device="meta")),
        "a list out": Half(lambda o: [o]), "None out": Half(lambda o: None), "NaN out": Half(lambda o: o * NAN), "detached out": Half(lambda o: o.detach()), "wide out": Half(lambda o: o[:, :1]),
    }.items():  # fmt: skip
        yield case(f"model: {name}", model)
    del frozen, halves
    for name, thing in {
        "None": None,
        "a string": "vit",
        "a dict": {},
        "a class": nn.Linear,
        "a function": lambda x: x,
        "a tensor": x,
    }.items():
        yield Case("tensors", f"model: {name}", lambda thing=thing: capruner.prune(thing, data(), **KNOWN))
    for name, masks in {
        "empty": {}, "a list": [torch.ones(8, 16)], "a wrong shape": {"3.weight": torch.ones(4)}, "a wrong name": {"x": torch.ones(8, 16)},
        "None": {"3.weight": None}, "a string": {"3.weight": "ones"}, "NaN": {"3.weight": torch.full((8, 16), NAN)}, "numbers for names": {3: torch.ones(8, 16)},
    }.items():  # fmt: skip
        model = net()
        yield Case(
            "tensors", f"compensate_masks: {name}",
            lambda m=model, masks=masks: capruner.compensate_masks(m, data(), nn.functional.cross_entropy, masks, **KNOWN), model,
        )  # fmt: skip
    result = capruner.prune(net(), data(), sparsity=[0.5, 0.8], **KNOWN)
    for name, other, s in (
        ("another architecture", nn.Linear(3, 3), 0.5), ("another shape", nn.Sequential(nn.Conv2d(3, 5, 3), *net()[1:]), 0.5), ("a sparsity that it has not", net(), 0.7),
        ("no sparsity", net(), None), ("a sparsity that is none", net(), "0.5"), ("NaN", net(), NAN), ("no model", None, 0.5), ("a dict", {}, 0.5),
    ):  # fmt: skip
        model_ = other if isinstance(other, nn.Module) else None
        yield Case("tensors", f"apply: {name}", lambda other=other, s=s: result.apply(other, s), model_)


def files(folder: Path) -> Iterator[Case]:
    """Results, states, checkpoints."""
    from capruner.report.checkpoint import read_weights

    good = folder / "good"
    capruner.prune(net(), data(), sparsity=0.5, **KNOWN).save(good)
    content = good.read_bytes()
    save_file({"a": torch.ones(2)}, folder / "foreign")
    torch.save({"a": nn.Linear(2, 2)}, folder / "module.pth")
    torch.save(net().state_dict(), folder / "weights.pth")
    spoiled: dict[str, bytes] = {
        "empty": b"", "a word": b"hello", "zeros": bytes(4096), "ones": b"\xff" * 4096, "half": content[: len(content) // 2], "no header": content[8:], "its head": content[:40],
        "a long header": (2**62).to_bytes(8, "little") + content[8:], "one bit": content[:-9] + bytes([content[-9] ^ 1]) + content[-8:], "one byte more": content + b"\0",
        "a pickle": (folder / "weights.pth").read_bytes(), "foreign tensors": (folder / "foreign").read_bytes(), "json": b"{}", "yaml": b"a: 1\n", "a png": b"\x89PNG\r\n\x1a\n",
        "a newer version": content.replace(b'\\"version\\": 2', b'\\"version\\": 7'), "another format": content.replace(b"capruner-result", b"capruner-resulT"),
        "no levels": content.replace(b'\\"levels\\"', b'\\"levelx\\"'), "a renamed tensor": content.replace(b'"0/mask/3.weight"', b'"0/mask/3.weighX"'),
    }  # fmt: skip
    readers: dict[str, Callable[[Path], object]] = {"load_result": capruner.load_result, "read_weights": read_weights}
    for reader, read in readers.items():
        for name, text in spoiled.items():
            if reader == "read_weights" and name in ("one bit", "foreign tensors", "a newer version", "another format", "no levels", "a pickle", "a renamed tensor"):  # fmt: skip
                continue  # a checkpoint like any other
            path = folder / f"{reader}-{name.replace(' ', '_')}{'.safetensors' if reader == 'read_weights' else ''}"
            path.write_bytes(text)
            yield Case("files", f"{reader}: {name}", lambda read=read, path=path: read(path))
        for name, path in {"nowhere": folder / "nowhere", "a folder": folder, "an empty name": Path()}.items():
            yield Case("files", f"{reader}: {name}", lambda read=read, path=path: read(path))
    yield Case("files", "read_weights: a pickled module", lambda: read_weights(folder / "module.pth"))
    result = capruner.load_result(good)
    for name, where in {
        "no such folder": folder / "x" / "y",
        "a folder": folder,
        "not writable": Path("/proc/x"),
    }.items():
        yield Case("files", f"save: {name}", lambda where=where: result.save(where))
    for name, text in spoiled.items():
        place = folder / f"state-{name.replace(' ', '_')}" / "rank-0-of-1"
        place.mkdir(parents=True)
        (place / "manifest-00000001.json").write_bytes(text)
        model = net()
        yield Case(
            "files",
            f"state: {name}",
            lambda p=place.parent, m=model: capruner.prune(m, data(), sparsity=0.5, state_dir=p, **KNOWN),
            model,
        )


CAP = {
    "params": "__ALL_PRUNABLE__", "init_sparsity": 0.5, "final_sparsity": 0.5, "start_epoch": 0.0, "end_epoch": 1.0, "update_frequency": 1.0,
    "num_grads": 8, "damp": 1e-3, "fisher_block_size": 8,
}  # fmt: skip


def recipe_text(**changes: Any) -> str:
    lines = [f"      {key}: {value}" for key, value in (CAP | changes).items() if value is not ...]
    return "\n".join(["modifiers:", "  - !CAPruningModifier", *lines, ""])


def recipes(folder: Path) -> Iterator[Case]:
    """YAML, read as the script reads it, and applied."""
    from capruner.cli.arguments import UserError
    from capruner.sparseml import recipe

    def apply(path: Path, model: nn.Module) -> object:
        manager = recipe.load_manager(str(path))
        modifier = recipe.pruning_modifier(manager, str(path))
        recipe.keep_inside(modifier, folder)
        builder = lambda kwargs=None, **more: (([x], {}, y) for x, y in data())  # noqa: E731
        return modifier.one_shot(
            model, [], {"data_loader_builder": builder, "loss_function": nn.functional.cross_entropy}
        )

    texts = {
        "nothing": "", "a word": "hello", "a list": "- 1\n- 2\n", "an open bracket": "modifiers: [", "tabs": "modifiers:\n\t- x\n", "no list": "modifiers: 3\n", "an empty list": "modifiers: []\n",
        "an unknown modifier": "modifiers:\n  - !PruneItAll\n      a: 1\n", "no tag": "modifiers:\n  - params: a\n", "an empty modifier": "modifiers:\n  - !CAPruningModifier\n",
        "two modifiers": recipe_text() + recipe_text().split("\n", 1)[1], "none that prunes": "modifiers:\n  - !EpochRangeModifier\n      start_epoch: 0.0\n      end_epoch: 1.0\n",
        "python": "modifiers: !!python/object/apply:os.getcwd []\n", "a python name": "modifiers: !!python/name:os.system\n", "a power": recipe_text(num_grads="eval(9**9**9)"),
        "an unknown variable": recipe_text(num_grads="eval(nothing)"), "a call": recipe_text(num_grads="eval(open('x'))"), "a reference to nothing": "modifiers: *a\n", "a cycle": "modifiers: &a [*a]\n",
        "two documents": "a: 1\n---\nb: 2\n", "json": '{"modifiers": 3}', "a colon too many": "modifiers: a: b\n", "a lone tag": "!CAPruningModifier\n", "a stage of nothing": "stage:\n  pruning_modifiers: 3\n",
    }  # fmt: skip
    values: dict[str, list[Any]] = {
        "params": ["nothing", "[]", "[re:(]", "3", "null", "[null]", "{a: b}", ...],
        "init_sparsity": ["half", "null", "[]", "2.0", "-1", ...],
        "final_sparsity": ["half", "null", "[]", "2.0", "-1", "1.0", ".nan", "{0.5: [x]}", "{x: [3.weight]}", ...],
        "start_epoch": ["soon", "null", "[]", ...],
        "end_epoch": ["late", "null", "[]", ...],
        "update_frequency": ["often", "null", "[]", ...],
        "num_grads": ["0", "-1", "0.5", "many", "[]", "{}", "true", "null", "nine", ".nan"],
        "damp": ["0", "-1", "much", "[]", "{}", ".nan", ".inf"],
        "fisher_block_size": ["0", "-1", "0.5", "large", "[]", "{}", "true"],
        "mask_type": ["3:2", "two:four", "[]", "{}", "null", "blocks", "'4:4'"],
        "num_recomputations": ["0", "-1", "0.5", "many", "[]", "true"],
        "distill_passes": ["-1", "many", "[]", "true", ".nan", ".inf"],
        "recomputation_inter_func": ["square", "[]", "3"],
        "gradients": ["batches", "[]", "3"],
        "labels": ["mine", "[]", "3"],
        "score": ["best", "[]", "3"],
        "relative_damp": ["maybe", "3", "[]"],
        "skip_unsupported": ["maybe", "3", "[]"],
        "memory_budget": ["1KiB", "lots", "-3", "[]"],
        "fisher_inv_device": ["gpu", "cuda:99", "3.5"],
        "blocks_in_parallel": ["0", "-2", "0.5", "many", "[]"],
        "on_bad_batch": ["ignore", "3", "[]"],
        "traces_backup_dir": ["/tmp/x", "../x", "a/../../x", ".", "[]"],
        "colour": ["red"],
        "global_sparsity": ["maybe", "3"],
        "leave_enabled": ["maybe"],
        "inter_func": ["bent"],
        "grad_sampler_kwargs": ["3", "[1]"],
    }
    texts |= {
        f"{key}: {'(absent)' if v is ... else v}": recipe_text(**{key: v}) for key, vs in values.items() for v in vs
    }
    for index, (name, text) in enumerate(texts.items()):
        path, model = folder / f"recipe{index}.yaml", net()
        path.write_text(text)

        def attempt(path: Path = path, model: nn.Module = model) -> object:
            try:
                return apply(path, model)
            except UserError as error:
                raise ValueError(error) from error

        yield Case("recipes", name, attempt, model)


def images(folder: Path) -> Iterator[Case]:
    """Data folders and the command line, through the one-shot script."""
    from capruner.cli import arguments as cli
    from capruner.vision import one_shot_pruning

    def split(root: Path, name: str, classes: int = 3, each: int = 4) -> None:
        for label in range(classes):
            place = root / name / f"class{label}"
            place.mkdir(parents=True)
            for index in range(each):
                pixels = np.random.default_rng(label).integers(0, 255, (16, 16, 3)).astype("uint8")
                Image.fromarray(pixels).save(place / f"{index}.png")

    good = folder / "good-data"
    split(good, "train"), split(good, "val")
    png = (good / "train" / "class0" / "0.png").read_bytes()
    contents = {
        "empty": b"", "text": b"no image", "cut short": png[:60], "half": png[: len(png) // 2], "noise": bytes(range(256)) * 4, "a header alone": png[:8], "another format's name": b"GIF89a",
        "a huge size": png[:16] + (2**31 - 1).to_bytes(4, "big") * 2 + png[24:], "bad checksum": png[:40] + b"\0\0\0\0" + png[44:], "html": b"<html><body>404</body></html>",
    }  # fmt: skip
    size = ["img_size=16", "patch_size=4", "embed_dim=16", "depth=1", "num_heads=2", "num_classes=3"]

    def line(**changes: Any) -> list[str]:
        given: dict[str, Any] = {
            "data-dir": good, "model": "vit_tiny_patch16_224", "model-kwargs": size, "num-grads": 4, "fisher-block-size": 16, "damp": 1e-3, "sparsities": [0.5],
            "experiment": "trial", "output": folder / "output", "gs-batch-size": 2, "workers": 0, "device": "cpu",
        } | {key.replace("_", "-"): value for key, value in changes.items()}  # fmt: skip
        words: list[str] = []
        for flag, value in given.items():
            if value is not None:
                values = value if isinstance(value, list) else [] if value is True else [value]
                words += [f"--{flag}", *map(str, values)]
        return words

    def script(words: list[str]) -> object:
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            try:
                status = cli.run(one_shot_pruning.main, words)
            except SystemExit as stop:  # argparse
                status = stop.code if isinstance(stop.code, int) else 1
        said = [text for text in errors.getvalue().splitlines() if text.startswith("error: ")]
        if status == 0:
            return None
        if status != 2 or "Traceback" in errors.getvalue() or len(said) != 1:
            raise RuntimeError(f"status {status}: {errors.getvalue()[-300:]}")
        raise ValueError(said[0])

    for name, content in contents.items():
        for where in ("train", "val"):
            root = folder / f"{where}-{name.replace(' ', '_')}"
            split(root, "train"), split(root, "val")
            for path in (root / where).rglob("*.png"):
                path.write_bytes(content)
            yield Case("images", f"{where}: {name}", lambda root=root: script(line(data_dir=root)))
    for name, splits in {"no val": [("train", 3, 4)], "no train": [("val", 3, 4)], "nothing": [], "empty folders": [("train", 3, 0), ("val", 3, 0)], "other classes": [("train", 3, 4), ("val", 2, 4)],
                         "too many classes": [("train", 4, 4), ("val", 4, 4)], "no classes": [("train", 0, 0), ("val", 0, 0)]}.items():  # fmt: skip
        root = folder / f"folder-{name.replace(' ', '_')}"
        root.mkdir()
        for what, classes, each in splits:
            split(root, what, classes, each)
        yield Case("images", f"folder: {name}", lambda root=root: script(line(data_dir=root)))
    flags: dict[str, list[Any]] = {
        "data_dir": ["/nowhere", good / "train" / "class0" / "0.png", ""], "dataset": ["torch/nothing", "nothing/at/all"], "model": ["vit_tinny", "", "../x"],
        "model_kwargs": [["img_size"], ["img_size=-1"], ["colour=3"], ["num_classes=7"], ["depth=x"]], "checkpoint": ["/nowhere.pth", good, good / "train" / "class0" / "0.png"],
        "num_grads": [0, -1, "x", 1.5], "damp": [-1, 0, "x", "nan"], "fisher_block_size": [0, -1, "x"], "sparsities": [[1.5], [-1], [50], ["x"], ["nan"]], "mask_type": ["3:2", "x"],
        "params": [["nothing"], ["re:("], [""]], "method": ["capp"], "gradients": ["x"], "labels": ["x"], "on_bad_batch": ["x"], "state_dir": [good, "/proc/x", "/dev/null/x"],
        "device": ["gpu", "cuda:99", "tpu"], "gs_batch_size": [0, -1, "x"], "val_batch_size": [0, -1, "x"], "workers": [-1, "x"], "val_limit": [0, -1, "x"], "recalibrate_bn": [-1, "x"],
        "img_size": [0, -1, "x"], "mean": [[0.5, 0.5], ["x"]], "std": [[0.5, 0.5], ["x"], [0, 0, 0]], "crop_pct": [0, -1, "x"], "interpolation": ["x"], "experiment": ["../x", "/x", "a/../../x"],
        "output": ["/proc/x", "/dev/null"], "sparseml_recipe": ["/nowhere.yaml", good], "seed": ["x", -1], "nonsense": [3],
    }  # fmt: skip
    for flag, values in flags.items():
        for value in values:
            yield Case(
                "images", f"--{flag} {value}"[-70:], lambda flag=flag, value=value: script(line(**{flag: value}))
            )


def cases(folder: Path, kinds: list[str]) -> Iterator[Case]:
    """All bad inputs of these classes."""
    every: dict[str, Callable[[], Iterator[Case]]] = {
        "arguments": arguments,
        "tensors": tensors,
        "files": lambda: files(folder / "files"),
        "recipes": lambda: recipes(folder / "recipes"),
        "images": lambda: images(folder / "images"),
    }
    for kind in kinds or every:
        (folder / kind).mkdir(exist_ok=True)
        yield from every[kind]()


def judged(case: Case) -> Outcome:
    """Try it."""
    before = None if case.model is None else [t.clone() for t in case.model.state_dict().values() if not t.is_meta]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            case.attempt()
        verdict, words = "silent", ""
    except ALLOWED as error:
        verdict, words = "refused", " ".join(str(error).split())
        if len(words) < 12:
            verdict = "traceback"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        verdict, words = "traceback", f"{type(error).__name__}: {' '.join(str(error).split())}"
    if before is not None and case.model is not None:
        after = [t for t in case.model.state_dict().values() if not t.is_meta]
        same = len(before) == len(after) and all(
            torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(before, after)
        )
        verdict = verdict if same else "changed"
    return Outcome(case, verdict, words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help="arguments, tensors, files, recipes, images (default: all)")
    parser.add_argument("--show", action="store_true", help="every input with its error")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    table: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(Path(folder), args.kinds):
            found = judged(case)
            table[case.kind][found.verdict] += 1
            if args.show or found.verdict != "refused":
                print(f"{found.verdict:9s} {case.kind}: {case.name}: {found.words[:300]}", flush=True)
    columns = ("refused", "traceback", "silent", "changed")
    print(f"\n{'class':10s} {'inputs':>7s}" + "".join(f"{column:>11s}" for column in columns))
    total: collections.Counter[str] = sum(table.values(), collections.Counter())
    for kind, counts in [*table.items(), ("all", total)]:
        print(f"{kind:10s} {counts.total():7d}" + "".join(f"{counts[column]:11d}" for column in columns))
    sys.exit(bool(total.total() - total["refused"]))


if __name__ == "__main__":
    main()
