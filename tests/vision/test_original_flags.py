"""The original repository's flags and configuration files: aliases, notes, and replacements."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from capruner.cli.arguments import Parser
from capruner.vision import one_shot_arguments, original_flags
from capruner.vision.training_arguments import parse

# One line of the original's launch script, with its own spelling of the flags.
ONE_SHOT = (
    "--data_dir data --sparseml_recipe one_shot/cap/vit --model deit_small_patch16_224 --gs_loader -gb 8 --val_batch_size 256 --workers 8 "
    "--output_dir out --checkpoint_path weights.pth --sparsities 0.5 0.75"
)
TRAINING = "data --model deit_small_patch16_224 --pretrained --sparseml-recipe gradual_pruning/cap/vit_4ep_small"
CONFIG = """
amp: false
apex_amp: false
aug_splits: 0
bn_eps: null
in_chans: 3
checkpoint_hist: 10
data_dir: null
eval_metric: top1
initial_checkpoint: ''
interpolation: ''
jsd: false
local_rank: 0
lr: 0.001
native_amp: true
output: ''
resume: ''
train_split: train
tta: 0
validation_batch_size_multiplier: 1
"""


def one_shot(line: str) -> argparse.Namespace:
    parser = Parser()
    one_shot_arguments.add_arguments(parser)
    return one_shot_arguments.checked(parser.parse_args(line.split()))


def test_the_one_shot_command(capsys: pytest.CaptureFixture[str]) -> None:
    args = one_shot(ONE_SHOT)
    assert (args.gs_batch_size, args.val_batch_size, args.output, args.checkpoint) == (8, 256, "out", "weights.pth")
    assert Path(args.sparseml_recipe).is_file()
    assert capsys.readouterr().err == (
        "note: --gs-loader has no effect: calibration images always come from the training split\n"
    )
    assert one_shot(ONE_SHOT.replace("-gb 8", "--grad_sampler_batch_size 4")).gs_batch_size == 4


def test_a_configuration_file(tmp_path: Path) -> None:
    (tmp_path / "deit.yaml").write_text(CONFIG)
    args = parse([*TRAINING.split(), "--config", str(tmp_path / "deit.yaml"), "-vb", "500", "--dr", "0.2"])
    assert (args.amp, args.lr, args.resume, args.checkpoint) == (True, 0.001, None, "")
    assert (args.val_batch_size, args.decay_rate) == (500, 0.2)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("apex_amp: true", "--apex-amp is not supported: use --amp"),
        ("gp: avg", "--gp is not supported: use --model-kwargs global_pool=NAME"),
        ("in_chans: 1", "--in-chans is not supported: use --model-kwargs in_chans=N"),
        (
            "validation_batch_size_multiplier: 2",
            "--validation-batch-size-multiplier is not supported: use --val-batch-size",
        ),
    ],
)
def test_a_key_without_counterpart_is_one_line(
    line: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old.yaml").write_text(line)
    with pytest.raises(SystemExit):
        parse([*TRAINING.split(), "--config", str(tmp_path / "old.yaml")])
    (shown,) = capsys.readouterr().err.splitlines()
    assert told in shown


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("--gs_aa", "--gs-aa is not supported: use --gs-aug"),
        ("--torchcompile", "--torchcompile is not supported: train without it"),
        ("--torchcompile inductor", "--torchcompile is not supported: train without it"),
    ],
)
def test_a_flag_without_counterpart_is_one_line(given: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse([*TRAINING.split(), *given.split()])
    assert told in capsys.readouterr().err


def test_a_value_that_asks_for_nothing_is_accepted() -> None:
    for given in ("--tta 0", "--start-epoch 0", "--drop-connect 0.0", "--head-init-scale 1.0", "--in-chans 3"):
        parse([*TRAINING.split(), *given.split()])


@pytest.mark.parametrize("given", ["--tta 2", "--in-chans 1", "--start-epoch 5", "--bn-momentum 0", "--gp avg"])
def test_a_value_that_asks_for_something_is_refused(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse([*TRAINING.split(), *given.split()])
    assert f"{given.split()[0]} is not supported: " in capsys.readouterr().err


def test_no_flag_of_the_original_hides_one_of_ours() -> None:
    names = [*original_flags.TRAINING, *original_flags.GONE]
    assert len(names) == len(set(names))
    args = vars(parse(TRAINING.split()))
    assert not set(names) & args.keys()
