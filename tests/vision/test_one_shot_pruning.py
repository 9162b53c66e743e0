"""The one-shot script as a user types it, on a tiny folder of images."""

from __future__ import annotations

import csv
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from image_folders import write_images
from PIL import Image
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "research" / "one_shot_pruning.py"
MODEL = "vit_tiny_patch16_224"
KWARGS = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}

sys.path.insert(0, str(ROOT))
import capruner  # noqa: E402
from capruner.cli import arguments as cli  # noqa: E402
from capruner.vision import one_shot_pruning  # noqa: E402


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/train, data/val, a checkpoint and recipes."""
    root = tmp_path_factory.mktemp("place")
    write_images(root / "data", train=8, val=5, tinted=True)
    torch.manual_seed(0)
    save_file(timm.create_model(MODEL, **KWARGS).state_dict(), root / "dense.safetensors")
    for name in ("CAPruningModifier", "FastCAPruningModifier", "OBSPruningModifier", "GlobalMagnitudePruningModifier"):
        lines = [
            "params: ['re:.*blocks.[0-9]+.mlp.(fc1|fc2).weight$']",
            *(
                "init_sparsity: 0.5",
                "final_sparsity: 0.5",
                "start_epoch: 0.0",
                "end_epoch: 1.0",
                "update_frequency: 1.0",
            ),
        ]
        if "Magnitude" not in name:
            lines += ["num_grads: 6", "damp: 1e-3", "fisher_block_size: 16"]
        text = f"modifiers:\n  - !{name}\n" + "".join(f"      {line}\n" for line in lines)
        (root / f"{name}.yaml").write_text(text)
    return root


def arguments(place: Path, recipe: str = "CAPruningModifier", **changes: object) -> list[str]:
    given: dict[str, object] = {
        "--data-dir": place / "data",
        "--model": MODEL,
        "--model-kwargs": [f"{key}={value}" for key, value in KWARGS.items()],
        "--checkpoint": place / "dense.safetensors",
        "--sparseml-recipe": place / f"{recipe}.yaml",
        "--sparsities": [0.5, 0.8],
        "--experiment": "trial",
        "--output": place / "output",
        "-gb": 4,
        "--workers": 0,
        "--device": "cpu",
        "--overwrite": True,
    } | {f"--{key.replace('_', '-')}": value for key, value in changes.items()}
    line: list[str] = []
    for flag, value in given.items():
        if value is not None:
            line += [flag, *(map(str, value) if isinstance(value, list) else [] if value is True else [str(value)])]
    return line


def summary(place: Path) -> dict:
    return json.loads((place / "output" / "trial" / "summary.json").read_text())


def test_as_a_subprocess_with_underscores_from_another_folder(place: Path, tmp_path: Path) -> None:
    line = [a.replace("-", "_") if a.startswith("--") else a for a in arguments(place, save_model=True)]
    line = [a.replace("__", "--", 1) if a.startswith("__") else a for a in line]
    done = subprocess.run([sys.executable, str(SCRIPT), *line], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--data_dir" in line
    assert list(tmp_path.iterdir()) == []  # no sparse_logs, nothing at all
    rows = summary(place)["rows"]
    assert [row["requested"] for row in rows] == [None, 0.5, 0.8]
    prunable, all_weights = 4 * 16 * 64, sum(p.numel() for p in timm.create_model(MODEL, **KWARGS).parameters())
    for row in rows[1:]:
        zeros = round(row["requested"] * prunable)
        assert row["reached_prunable"] == zeros / prunable
        assert row["reached_all"] == zeros / all_weights
        assert row["method"] == "CAP"
        assert {"top1", "top5", "loss", "peak_memory_gib", "seconds_gradients", "seconds_eliminate"} <= row.keys()
    folder = place / "output" / "trial"
    with (folder / "summary.csv").open() as file:
        assert [row["requested"] for row in csv.DictReader(file)] == ["", "0.5", "0.8"]
    for picture in ("accuracy_vs_sparsity.png", "layer_sparsity.png"):
        with Image.open(folder / picture) as image:
            assert image.size[0] > 300
    assert (folder / "recipe.yaml").read_text() == (place / "CAPruningModifier.yaml").read_text()
    assert "written to" in done.stdout

    loaded = timm.create_model(
        MODEL, checkpoint_path=str(folder / "checkpoints" / "sparsity_0.8.safetensors"), **KWARGS
    )
    zeros = sum(
        int((w == 0).sum()) for name, w in loaded.named_parameters() if ".mlp." in name and name.endswith("weight")
    )
    assert zeros == round(0.8 * prunable)


@pytest.mark.parametrize("recipe", ["FastCAPruningModifier", "OBSPruningModifier", "GlobalMagnitudePruningModifier"])
def test_other_recipes(place: Path, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one_shot_pruning.main(arguments(place, recipe))
    rows = summary(place)["rows"]
    assert [round(row["reached_prunable"], 3) for row in rows] == [0.0, 0.5, 0.8]
    assert list(tmp_path.iterdir()) == []


def test_without_sparsities_the_recipe_s_own(place: Path) -> None:
    one_shot_pruning.main(arguments(place, sparsities=None))
    assert [row["requested"] for row in summary(place)["rows"]] == [None, 0.5]


def test_batchnorm_recalibration_is_reported_beside_the_plain_accuracy(place: Path) -> None:
    recipe = place / "conv.yaml"
    text = (place / "CAPruningModifier.yaml").read_text()
    recipe.write_text(
        text.replace("re:.*blocks.[0-9]+.mlp.(fc1|fc2).weight$", "re:layer.*conv.*weight$").replace(
            "fisher_block_size: 16", "fisher_block_size: 8"
        )
    )
    line = arguments(
        place,
        model="resnet10t",
        model_kwargs=["num_classes=3", "zero_init_last=False"],
        checkpoint=None,
        random_weights=True,
        img_size=32,
        recalibrate_bn=2,
        sparsities=[0.5],
    )
    line[line.index("--sparseml-recipe") + 1] = str(recipe)
    one_shot_pruning.main(line)
    row = summary(place)["rows"][1]
    assert {"top1", "top1_bn"} <= row.keys()
    assert row["loss"] != row["loss_bn"]


OTHER = {"model_kwargs": [f"{k}={v}" for k, v in (KWARGS | {"num_classes": 7}).items()]}
BAD = {
    "no folder": ({"data_dir": "/nowhere"}, "--data-dir /nowhere is not a folder"),
    "unknown model": ({"model": "vit_tinny_patch16_224"}, "timm has no such model; near:.*vit_tiny_patch16_224"),
    "missing checkpoint": ({"checkpoint": "/nowhere.pth"}, "--checkpoint /nowhere.pth: no checkpoint at /nowhere.pth"),
    "other classes": (OTHER | {"checkpoint": None, "random_weights": True}, "3 classes, the model 7 outputs"),
    "sparsity in percent": ({"sparsities": [50]}, r"must lie in \[0, 1\); write 0.9 for 90 %"),
    "experiment outside": ({"experiment": "../up"}, "must be a name inside --output"),
    "no recipe": ({"sparseml_recipe": "/nowhere.yaml"}, "no such file, and no shipped recipe"),
    "no gpu": ({"device": "cuda"}, "torch sees no GPU here"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_clear_line(case: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if case == "no gpu" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    changes, message = BAD[case]
    assert cli.run(one_shot_pruning.main, arguments(place, **changes)) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert any(line.startswith("error: ") for line in error.splitlines())
    with pytest.raises(cli.UserError, match=message):
        one_shot_pruning.main(arguments(place, **changes))


RECIPES = {
    "not yaml": ("modifiers: [", "is not YAML"),
    "unknown modifier": ("modifiers:\n  - !PruneItAllModifier\n      params: [a]\n", "modifiers that exist: .*CAPruningModifier.*OBSPruningModifier"),
    "unknown argument": ("modifiers:\n  - !CAPruningModifier\n      params: [a]\n      colour: red\n", "does not load: .*colour"),
    "no pruning modifier": ("modifiers:\n  - !EpochRangeModifier\n      start_epoch: 0.0\n      end_epoch: 1.0\n", "this one has none"),
    "nothing": ("", "does not load"),
}  # fmt: skip


@pytest.mark.parametrize("case", RECIPES)
def test_bad_recipes(case: str, place: Path) -> None:
    if case in ("unknown modifier", "no pruning modifier"):  # refused in other words without SparseML
        pytest.importorskip("capruner.sparseml", exc_type=ImportError)
    text, message = RECIPES[case]
    path = place / "bad.yaml"
    path.write_text(text)
    line = arguments(place)
    line[line.index("--sparseml-recipe") + 1] = str(path)
    with pytest.raises(cli.UserError, match=message):
        one_shot_pruning.main(line)


def test_a_pattern_that_matches_nothing_and_an_empty_split(place: Path, tmp_path: Path) -> None:
    path = place / "miss.yaml"
    path.write_text((place / "CAPruningModifier.yaml").read_text().replace(".mlp.", ".mlpp."))
    line = arguments(place)
    line[line.index("--sparseml-recipe") + 1] = str(path)
    with pytest.raises(ValueError, match=r"no parameter name matches .*nearest names are blocks\.0\.mlp"):
        one_shot_pruning.main(line)
    (tmp_path / "train").mkdir()
    with pytest.raises(cli.UserError, match=r"train"):
        one_shot_pruning.main(arguments(place, data_dir=tmp_path))


def test_an_output_that_cannot_be_written_is_found_before_the_work(place: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(cli.UserError, match="nothing can be written to"):
        one_shot_pruning.main(arguments(place, output=blocked, data_dir="/nowhere"))


def test_multiply_adds_can_decide(place: Path, tmp_path: Path) -> None:
    left = {}
    for by in ("weights", "macs"):
        conv = {
            "model": "resnet18",
            "model_kwargs": ["channels=[4,6,8,10]", "num_classes=3"],
            "checkpoint": None,
            "random_weights": True,
        }
        own = {"sparseml_recipe": None, "num_grads": 6, "img_size": 32, "output": tmp_path, "experiment": by}
        one_shot_pruning.main(arguments(place, allocate_by=by, **conv, **own))
        rows = json.loads((tmp_path / by / "summary.json").read_text())["rows"]
        assert [row["reached_prunable"] for row in rows] == pytest.approx([0.0, 0.5, 0.8], abs=1e-3)
        left[by] = [row["macs_left"] for row in rows]
    assert left["macs"][0] == left["weights"][0]
    assert left["macs"][2] < left["weights"][2]


@pytest.mark.parametrize("recipe", ["FastCAPruningModifier", "GlobalMagnitudePruningModifier"])
def test_multiply_adds_mean_nothing_to_others(recipe: str, place: Path) -> None:
    with pytest.raises(cli.UserError, match=f"--allocate-by macs is not supported by {recipe}"):
        one_shot_pruning.main(arguments(place, recipe, allocate_by="macs"))


def test_sparse_checkpoints_are_those_of_the_run(place: Path, tmp_path: Path) -> None:
    there: dict[str, object] = {"recipe": "GlobalMagnitudePruningModifier", "sparsities": [0.8], "overwrite": None}
    for kind in ("dense", "sparse"):
        one_shot_pruning.main(arguments(place, **there, output=tmp_path / kind, save_model=kind))
    file = Path("trial") / "checkpoints" / "sparsity_0.8.safetensors"
    dense, sparse = load_file(tmp_path / "dense" / file), capruner.load_sparse(tmp_path / "sparse" / file)
    assert dense.keys() == sparse.keys()
    assert all(torch.equal(sparse[name], value) for name, value in dense.items())
    assert (tmp_path / "sparse" / file).stat().st_size < (tmp_path / "dense" / file).stat().st_size


@pytest.mark.promise("Scripts", "The folder of a finished run is replaced with `--overwrite` only, and as a whole")
def test_a_finished_run_is_replaced_only_when_asked_and_wholly(place: Path, tmp_path: Path) -> None:
    there: dict[str, object] = {"recipe": "GlobalMagnitudePruningModifier", "output": tmp_path, "save_model": True}
    one_shot_pruning.main(arguments(place, **there))
    folder = tmp_path / "trial"
    before = (folder / "summary.json").read_bytes()
    with pytest.raises(cli.UserError, match=r"trial holds a finished run; .* or replace it with --overwrite"):
        one_shot_pruning.main(arguments(place, **there | {"sparsities": [0.6], "overwrite": None}))
    inside = folder / "checkpoints" / "sparsity_0.5.safetensors"
    with pytest.raises(cli.UserError, match=r"--checkpoint .* lies in .*trial, which this run will fill"):
        one_shot_pruning.main(arguments(place, **there | {"checkpoint": inside}))
    assert (folder / "summary.json").read_bytes() == before
    one_shot_pruning.main(arguments(place, **there | {"sparsities": [0.6]}))
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["sparsity_0.6.safetensors"]
    assert [row["requested"] for row in json.loads((folder / "summary.json").read_text())["rows"]] == [None, 0.6]


def test_an_interrupted_run_is_replaced_without_asking(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there: dict[str, object] = {"recipe": "GlobalMagnitudePruningModifier", "output": tmp_path, "overwrite": None}
    with monkeypatch.context() as patch:
        patch.setattr(one_shot_pruning.Run, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            one_shot_pruning.main(arguments(place, **there, save_model=True))
    one_shot_pruning.main(arguments(place, **there, sparsities=[0.6]))
    assert list((tmp_path / "trial" / "checkpoints").iterdir()) == []


def test_the_folder_of_a_training_is_not_for_one_shot(place: Path, tmp_path: Path) -> None:
    (tmp_path / "trial").mkdir()
    (tmp_path / "trial" / "last.pt").touch()
    with pytest.raises(cli.UserError, match=r"trial holds a run of sparse_training.py"):
        one_shot_pruning.main(arguments(place, output=tmp_path))


def weights(place: Path) -> dict[str, torch.Tensor]:
    return load_file(place / "output" / "trial" / "checkpoints" / "sparsity_0.8.safetensors")


@pytest.mark.parametrize("recipe", ["CAPruningModifier", "FastCAPruningModifier", "GlobalMagnitudePruningModifier"])
def test_both_engines_come_to_the_same_bits(place: Path, recipe: str) -> None:
    pytest.importorskip("capruner.sparseml", exc_type=ImportError)
    found = {}
    for engine in ("native", "sparseml"):
        one_shot_pruning.main(arguments(place, recipe, engine=engine, save_model=True))
        assert summary(place)["engine"] == engine
        found[engine] = weights(place)
    assert all(torch.equal(value, found["sparseml"][name]) for name, value in found["native"].items())


@pytest.mark.parametrize("recipe", ["CAPruningModifier", "OBSPruningModifier"])
def test_the_engine_where_none_is_asked_for(
    place: Path, recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ours are carried out here; SparseML's own by SparseML, and by our method, not without a word, where it cannot be imported."""
    ours = recipe == "CAPruningModifier"
    if importlib.util.find_spec("sparseml"):
        one_shot_pruning.main(arguments(place, recipe, sparsities=[0.5]))
        assert summary(place)["engine"] == ("native" if ours else "sparseml")
    monkeypatch.delitem(sys.modules, "capruner.sparseml.recipe", raising=False)
    monkeypatch.setitem(sys.modules, "sparseml", None)
    for name in [name for name in sys.modules if name.startswith(("sparseml.", "capruner.sparseml"))]:
        monkeypatch.delitem(sys.modules, name)
    capsys.readouterr()
    one_shot_pruning.main(arguments(place, recipe, sparsities=[0.5]))
    told = "OBSPruningModifier is carried out by capruner's own methods" in capsys.readouterr().err
    assert (summary(place)["engine"], told) == ("native", not ours)
    with pytest.raises(cli.UserError, match="--engine sparseml: SparseML cannot be imported here"):
        one_shot_pruning.main(arguments(place, recipe, engine="sparseml"))


def test_what_the_native_engine_does_not_do(place: Path) -> None:
    path = place / "mfac.yaml"
    path.write_text((place / "OBSPruningModifier.yaml").read_text().replace("OBS", "MFAC"))
    with pytest.raises(
        cli.UserError, match="MFACPruningModifier is none of the pruning modifiers that capruner carries"
    ):
        one_shot_pruning.main(arguments(place, "mfac", engine="native"))
