"""Gradual training as a user types it, on a tiny folder of images, in this process."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from training_case import GMP, KWARGS, MODEL, PRUNABLE, RECIPES, ROOT, SPARSEML, Line, rows, same_weights, updates

pytest.importorskip("timm")
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning:timm")
from capruner.cli import arguments as cli  # noqa: E402
from capruner.vision import sparse_training  # noqa: E402
from capruner.vision.training_arguments import parse  # noqa: E402


def test_a_run_writes_all_that_it_promises(line: Line, tmp_path: Path) -> None:
    sparse_training.main(line(model_ema=True, model_ema_decay=0.9, epochs=4, checkpoint_freq=2, save_last=True))
    folder = tmp_path / "trial"
    assert [float(row["sparsity"]) for row in rows(folder)] == pytest.approx([0, 0, 0.6735, 0.7952, 0.8], abs=1e-4)
    assert all(row["ema_top1"] for row in rows(folder))
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    reached = ["0.0000", "0.6735", "0.7952", "0.8000"]
    assert names == sorted(
        [f"best_sparsity_{s}.safetensors" for s in reached]
        + ["epoch_2.safetensors", "epoch_4.safetensors", "last.safetensors"]
    )
    assert {path.name for path in folder.iterdir()} == {
        *(
            "summary.csv",
            "training.png",
            "layer_sparsity.json",
            "recipe.yaml",
            "arguments.yaml",
            "last.pt",
            "report.html",
            "checkpoints",
        )
    }
    best = timm.create_model(
        MODEL, **KWARGS, checkpoint_path=folder / "checkpoints" / "best_sparsity_0.8000.safetensors"
    )
    pruned = [w for name, w in best.named_parameters() if "blocks" in name and w.dim() == 2]
    assert sum(int((w == 0).sum()) for w in pruned) == round(0.8 * PRUNABLE)
    layers = json.loads((folder / "layer_sparsity.json").read_text())[-1]["layers"]
    assert sum(row["zeros"] for row in layers) == round(0.8 * PRUNABLE)
    assert (folder / "training.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize(("batches", "per_step"), [(6, 1), (6, 2), (6, 4)], ids=["no accumulation", "two", "a rest"])
def test_updates_come_at_their_epoch_however_gradients_are_accumulated(
    line: Line, tmp_path: Path, batches: int, per_step: int
) -> None:
    sparse_training.main(line(grad_accum_steps=per_step))
    steps = -(-batches // per_step)
    due = [1.0, 1.5, 2.0, 2.5, 3.0]
    expected = [-(-round(epoch * steps, 6) // 1) / steps for epoch in due]
    # Training ends at epoch 3, where the last update is due: it comes although no step follows. Others are seen after their step.
    after = [min(epoch + 1 / steps, 3.0) for epoch in expected]
    assert [epoch for epoch, _ in updates(tmp_path / "trial")] == pytest.approx(after)
    cubic = [0.8 - 0.3 * (1 - (epoch - 1) / 2) ** 3 for epoch in expected]
    assert [sparsity for _, sparsity in updates(tmp_path / "trial")] == pytest.approx(cubic, abs=1 / PRUNABLE)


def test_updates_between_steps_do_not_drift(line: Line, tmp_path: Path) -> None:
    """Due at 0, 1/3, 2/3, 1 with four steps in an epoch: at the steps that begin at 0, 0.5, 0.75, 1."""
    sparse_training.main(line("thirds", batch_size=6, epochs=2))
    assert [epoch for epoch, _ in updates(tmp_path / "trial")] == pytest.approx([0.25, 0.75, 1.0, 1.25])


def test_chained_modifiers_hand_over_without_a_second_calibration(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    batches = sparse_training.GradientSamples._batches
    monkeypatch.setattr(
        sparse_training.GradientSamples, "_batches", lambda self, size: drawn.append(size) or batches(self, size)
    )
    sparse_training.main(line("chain"))
    reached = [sparsity for _, sparsity in updates(tmp_path / "trial")]
    assert reached == pytest.approx([0.4, 0.6, 0.775, 0.8], abs=1 / PRUNABLE)
    assert len(drawn) == 4


@pytest.mark.parametrize("recipe", ["cap", "gmp", "chain"])
def test_a_ladder_of_sparsities_replaces_the_interpolation(line: Line, tmp_path: Path, recipe: str) -> None:
    sparse_training.main(line(recipe, sparsities=[0.3, 0.5, 0.6]))
    reached = [sparsity for _, sparsity in updates(tmp_path / "trial")]
    expected = [0.3, 0.5, 0.6] + [0.6] * (len(reached) - 3)
    assert reached == pytest.approx(expected, abs=1 / PRUNABLE)
    assert len(reached) >= 3


@pytest.mark.parametrize("recipe", ["chain", "rate", "gmp"])
def test_both_engines_end_with_the_same_weights(line: Line, tmp_path: Path, recipe: str) -> None:
    pytest.importorskip("capruner.sparseml", exc_type=ImportError)
    for engine in ("native", "sparseml"):
        sparse_training.main(
            line(recipe, experiment=engine, engine=engine, epochs=3, clip_grad=0.5, save_last=True, model_ema=True)
        )
    assert updates(tmp_path / "native") == updates(tmp_path / "sparseml")
    assert same_weights(*(tmp_path / engine / "checkpoints" / "last.safetensors" for engine in ("native", "sparseml")))
    with pytest.raises(cli.UserError, match="--engine was 'native' and is 'sparseml' now, which cannot change"):
        sparse_training.main(line(recipe, experiment="native", engine="sparseml", epochs=3, clip_grad=0.5, resume=True))


def test_recipes_of_sparseml_without_it(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "capruner.sparseml.training", None)
    sparse_training.main(line("gmp", epochs=2))
    assert "GlobalMagnitudePruningModifier is carried out by capruner's own methods" in capsys.readouterr().err
    assert updates(tmp_path / "trial")[-1][1] == pytest.approx(0.6734, abs=1 / PRUNABLE)
    with pytest.raises(cli.UserError, match="--engine sparseml: SparseML cannot be imported here"):
        sparse_training.main(line("gmp", epochs=2, engine="sparseml", experiment="other"))


@pytest.mark.parametrize("engine", ["native", "sparseml"])
def test_masks_let_go_with_the_training_s_end_still_count(line: Line, tmp_path: Path, engine: str) -> None:
    if engine == "sparseml":
        pytest.importorskip("capruner.sparseml", exc_type=ImportError)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "modifiers:\n" + GMP.format(first=0.5, last=0.6, start=0.0, end=2.0, every=1.0) + "      leave_enabled: False\n"
    )
    sparse_training.main(line(sparseml_recipe=recipe, engine=engine))
    assert [float(row["sparsity"]) for row in rows(tmp_path / "trial")][-1] == pytest.approx(0.6, abs=1 / PRUNABLE)
    assert (
        tmp_path / "trial" / "checkpoints" / f"best_sparsity_{round(0.6 * PRUNABLE) / PRUNABLE:.4f}.safetensors"
    ).exists()


def test_a_markdown_recipe_is_kept_as_yaml_and_resumes(line: Line, training_place: Path, tmp_path: Path) -> None:
    text = (training_place / "oneshot.yaml").read_text()
    (tmp_path / "recipe.md").write_text(f"---\n{text}---\n# My recipe\n\nIt is **bold**.\n\n---\n\n- and more\n")
    sparse_training.main(line(sparseml_recipe=tmp_path / "recipe.md", epochs=1))
    kept = tmp_path / "trial" / "recipe.yaml"
    assert "bold" not in kept.read_text()
    sparse_training.main(line(sparseml_recipe=kept, epochs=2, resume=True))
    assert len(rows(tmp_path / "trial")) == 3


def test_one_shot_then_finetuning(line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sparse_training.main(line("oneshot"))
    assert [float(row["sparsity"]) for row in rows(tmp_path / "trial")] == [0, 0.75, 0.75]


def test_the_recipes_learning_rate_switches_timms_scheduler_off(
    line: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sparse_training.main(line("rate", lr=0.5))
    assert "the recipe sets the learning rate" in capsys.readouterr().out
    rates = [float(row["lr"]) for row in rows(tmp_path / "trial")[1:]]
    assert len(rates) == 4
    assert all(1e-5 <= rate < 1e-3 for rate in rates)


@pytest.mark.parametrize(
    "flags",
    [
        {"amp": True},
        {"mixup": 0.5, "cutmix": 1.0},
        {"mixup": 0.5, "no_prefetcher": True, "bce_loss": True},
        {"aa": "rand-m10-n9-inc1", "reprob": 0.3, "drop_path": 0.1, "clip_grad": 1.0},
        {"opt": "lamb", "sched": "step", "sched_on_updates": True, "channels_last": True, "smoothing": 0.0},
        {"gs_aug": True, "no_aug": True, "val_limit": 4, "grad_checkpointing": True},
    ],
    ids=lambda flags: ",".join(flags),
)
def test_flags_of_timm(line: Line, tmp_path: Path, flags: dict[str, Any]) -> None:
    sparse_training.main(line("oneshot", **flags))
    last = rows(tmp_path / "trial")[-1]
    assert float(last["sparsity"]) == 0.75
    assert 0 < float(last["train_loss"]) < 5


def test_a_step_skipped_by_mixed_precision_does_not_shift_the_recipe(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from capruner.vision.training_loop import Stepper

    step, skipped = Stepper.step, []

    def overflowing(self: Stepper) -> None:
        if len(skipped) < 5:
            next(p for p in self._parameters if p.grad is not None).grad.fill_(float("inf"))
            before = [p.detach().clone() for p in self._parameters]
            step(self)
            skipped.append(all(torch.equal(a, b) for a, b in zip(before, self._parameters)))
        else:
            step(self)

    monkeypatch.setattr(Stepper, "step", overflowing)
    sparse_training.main(line(amp=True, amp_dtype="float16", epochs=4))
    assert skipped == [True] * 5
    due = [1.0, 1.5, 2.0, 2.5, 3.0]
    assert [epoch for epoch, _ in updates(tmp_path / "trial")] == pytest.approx([epoch + 1 / 6 for epoch in due])


@pytest.mark.parametrize("config", sorted((ROOT / "research" / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_is_understood(config: Path, line: Line) -> None:
    args = parse([word for word in line(lr=None, opt=None, batch_size=None)] + ["--config", str(config)])
    assert args.opt == "adamw"
    assert args.weight_decay in (0.05, 0.005, 0.03)


def test_the_command_line_goes_before_the_configuration(line: Line, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        "lr: 1e-2\nweight-decay: 0.3\nmodel_ema: true\npin_mem: false\nepochs: null\nmodel_kwargs: {drop_rate: 0.1}\nsparsities: [0.2, 0.3]\n"
    )
    args = parse([*line(), "--config", str(config)])
    assert (args.lr, args.weight_decay, args.model_ema, args.pin_mem, args.epochs) == (1e-3, 0.3, True, False, None)
    assert args.model_kwargs == KWARGS | {"drop_rate": 0.1}
    assert args.sparsities == [0.2, 0.3]


def test_underscores_and_the_positional_folder(training_place: Path) -> None:
    recipe = str(training_place / "cap.yaml")
    args = parse([str(training_place / "data"), "--model", MODEL, "--sparseml_recipe", recipe, "--local_rank=1"])
    assert args.data_dir == str(training_place / "data")
    assert args.experiment.endswith("-cap")


def test_help_is_grouped(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sparse_training.main(["--help"])
    text = capsys.readouterr().out
    for heading in ("pruning:", "data:", "model:", "optimizer:", "device and processes:", "output:"):
        assert heading in text
    assert "torchrun" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_dir": None}, "--data-dir is missing"),
        ({"sparsities": [0.5, 90]}, "write 0.9 for 90 %"),
        ({"sparsities": [0.5, 0.4]}, "must ascend"),
        ({"sparsities": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]}, "has 6 steps, but .* updates 5 times"),
        ({"batch_size": 64}, "has 24 images, fewer than one batch"),
        ({"batch_size": 3, "mixup": 0.5}, "must be even, got 3"),
        ({"grad_accum_steps": 0}, "at least 1, got 0"),
        ({"opt": "adamwww"}, "--opt adamwww cannot be built"),
        ({"sched": "zigzag"}, "--sched zigzag cannot be built"),
        ({"sparseml_recipe": "nowhere.yaml"}, "no such file"),
        ({"log_param_histogram": True}, "add --log-wandb"),
        ({"resume": "nowhere.pt"}, "nowhere.pt: no such file"),
        ({"timeout": 0}, "more than 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_mistakes_are_told_before_the_work(line: Line, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(cli.UserError, match=message):
        sparse_training.main(line(**changes))


def test_recipes_that_cannot_drive_a_training(line: Line, training_place: Path, tmp_path: Path) -> None:
    with pytest.raises(cli.UserError, match="no pruning modifier"):
        sparse_training.main(line("rate_only"))
    hidden = "  - !LearningRateModifier\n      lr_class: ExponentialLR\n      lr_kwargs: {gamma: 0.9}\n"
    hidden += "      init_lr: 0.01\n      start_epoch: 0.0\n      end_epoch: 4.0\n"
    (tmp_path / "hidden.yaml").write_text("modifiers:\n" + hidden + RECIPES["cap"])
    with pytest.raises(cli.UserError, match="use LearningRateFunctionModifier"):
        sparse_training.main(line(sparseml_recipe=tmp_path / "hidden.yaml"))
    (tmp_path / "teacher.yaml").write_text(
        "modifiers:\n  - !DistillationModifier {start_epoch: 0, hardness: 0.5}\n" + RECIPES["cap"]
    )
    for engine in ("native", "sparseml") if SPARSEML else ("native",):
        with pytest.raises(cli.UserError, match="DistillationModifier has no effect here"):
            sparse_training.main(line(sparseml_recipe=tmp_path / "teacher.yaml", engine=engine))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning_rate: 0.1\n", "unknown key 'learning_rate'"),
        ("weight_decy: 0.1\n", "near: weight_decay"),
        ("model_ema: 3\n", "must be true or false, got 3"),
        ("[1, 2]\n", "it holds a list"),
        ("a: [\n", "is not YAML"),
    ],
)
def test_a_configuration_with_a_mistake(line: Line, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(cli.UserError, match=message):
        parse([*line(), "--config", str(tmp_path / "config.yaml")])


def test_a_loss_that_is_not_finite_stops_training(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="Lower the learning rate"):
        sparse_training.main(line("gmp", opt="sgd", lr=1e30))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"img_size": 64}, r"does not take images of \(3, 64, 64\)"),
        (
            {"model": "mnasnet_small", "model_kwargs": ["num_classes=3"], "grad_checkpointing": True},
            "does not support it",
        ),
        ({"model_kwargs": ["img_size=16", "num_classes=3", "in_chans=4"]}, "takes 4 input channels"),
        ({"sched": "wsd", "decay_epochs": 99}, "--sched wsd cannot be built"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_timm_or_the_model_trips_over_is_one_line(
    line: Line, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(self: Any, enable: bool = True) -> None:
        assert not enable, "gradient checkpointing not supported"

    import timm

    monkeypatch.setattr(timm.create_model("mnasnet_small").__class__, "set_grad_checkpointing", missing)
    with pytest.raises(cli.UserError, match=message):
        sparse_training.main(line(**changes))


def test_repeated_augmentation_is_off_with_one_process(line: Line, tmp_path: Path, capsys: Any) -> None:
    sparse_training.main(line("oneshot", epochs=1, aug_repeats=3))
    assert "--aug-repeats 3 is for several processes; it is off in this run of one" in capsys.readouterr().err
    assert len(rows(tmp_path / "trial")) == 2


class Wandb(types.ModuleType):
    """Remembers what it was told."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.id, self.options, self.logged = "abc", {}, []

    def init(self, **options: Any) -> Wandb:
        self.options = options
        return self

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        pass


@pytest.mark.parametrize("script", ["training", "one_shot"])
@pytest.mark.parametrize("named", [False, True])
def test_weights_and_biases_gets_the_recipe_and_every_layer(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, named: bool
) -> None:
    from capruner.vision import one_shot_pruning

    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for variable in ("WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.setenv(variable, "mine") if named else monkeypatch.delenv(variable, raising=False)
    if script == "training":
        sparse_training.main(line("oneshot", epochs=1, log_wandb=True))
    else:
        one_shot_pruning.main(line("oneshot", batch_size=None, opt=None, lr=None, sparsities=[0.75], log_wandb=True))
    assert ("project" in wandb.options, "name" in wandb.options) == (not named, not named)
    assert "CAPruningModifier" in wandb.options["config"]["recipe"]
    shares = {key: value for key, value in wandb.logged[-1].items() if key.startswith("sparsity/")}
    assert len(shares) == 8
    assert "sparsity/blocks.0.mlp.fc1.weight" in shares
    assert 0.6 < sum(shares.values()) / 8 < 0.9
