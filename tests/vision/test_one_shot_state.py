"""The one-shot script, killed and started again; stopped by signals; and a state folder that a recipe names."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_case import ROOT, Line

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning:timm")
from capruner.calibration import driver  # noqa: E402
from capruner.calibration.memory_plan import WORKING_SET  # noqa: E402
from capruner.checkpoint import store  # noqa: E402
from capruner.cli import arguments as cli  # noqa: E402
from capruner.vision import one_shot_pruning  # noqa: E402

FLAGS: dict[str, Any] = {
    "sparseml_recipe": None,
    "batch_size": None,
    "opt": None,
    "lr": None,
    "num_grads": 40,
    "fisher_block_size": 48,
    "damp": 1e-4,
    "sparsities": [0.5, 0.8],
}
# Kills itself with the signal given at its n-th save.
DYING = """
import os, sys
sys.path.insert(0, {root!r})
from capruner.checkpoint import run
from capruner.vision import one_shot_pruning
from capruner.cli import arguments as cli
run.SAVE_EVERY = 0.0
saves, save = [], run.RunCheckpoint.save
def save_and_die(self, *args):
    save(self, *args)
    saves.append(0)
    if len(saves) == {last}:
        os.kill(os.getpid(), {number})
run.RunCheckpoint.save = save_and_die
sys.exit(cli.run(one_shot_pruning.main))
"""


def arguments(line: Line, **changes: Any) -> list[str]:
    return line(**(FLAGS | changes))


def dies(words: list[str], number: int, last: int = 3) -> subprocess.CompletedProcess[str]:
    script = DYING.format(root=str(ROOT), last=last, number=int(number))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, env=environment)


def weights(tmp_path: Path, experiment: str = "trial") -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(tmp_path / experiment / "result.safetensors")
    return found


@pytest.mark.promise("Resume", "A calibration killed at any moment resumes with bit-identical results on a CPU")
@pytest.mark.parametrize(("number", "workers"), [(signal.SIGKILL, 0), (signal.SIGTERM, 1)])
def test_killed_it_goes_on_to_the_same_bits(
    number: signal.Signals, workers: int, line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {"gs_aug": True, "workers": workers}  # whose workers must not take SIGTERM's exception for theirs
    there = arguments(line, state_dir=tmp_path / "state", **flags)
    done = dies(there, number)
    assert done.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143}[number]
    assert "Traceback" not in done.stderr
    if number == signal.SIGTERM:
        assert done.stderr.splitlines()[-1].startswith("terminated; what was saved before is whole")
    assert list((tmp_path / "state").glob("*/manifest-00000003.json"))
    drawn = []
    passing = driver.gradient_slabs
    monkeypatch.setattr(driver, "gradient_slabs", lambda *a, **k: (drawn.append(a[1].taken), passing(*a, **k))[1])
    one_shot_pruning.main(there)
    one_shot_pruning.main(arguments(line, experiment="whole", **flags))
    assert drawn == [18, 0]
    assert not (tmp_path / "state").exists()
    found, expected = weights(tmp_path), weights(tmp_path, "whole")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_killed_after_the_calibration_it_is_not_done_again(line: Line, tmp_path: Path) -> None:
    words = arguments(line, state_dir=tmp_path / "state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_shot_pruning.Run, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            one_shot_pruning.main(words)
    before = weights(tmp_path)
    assert (tmp_path / "state").is_dir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "gradient_slabs", None)  # nothing is drawn any more
        one_shot_pruning.main(words)
    assert all(torch.equal(before[key], value) for key, value in weights(tmp_path).items())
    assert not (tmp_path / "state").exists()


@pytest.mark.promise("Scripts", "Ctrl-C and SIGTERM end a run with one line; a second Ctrl-C ends it at once")
def test_ctrl_c_is_one_line(
    line: Line, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the suite runs in the background
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    monkeypatch.setattr(one_shot_pruning.Run, "record", lambda *_: signal.raise_signal(signal.SIGINT))
    assert cli.run(one_shot_pruning.main, arguments(line)) == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("interrupted; what was saved before is whole")
    with pytest.raises(KeyboardInterrupt):
        cli.run(one_shot_pruning.main, [*arguments(line), "--debug"])


RECIPE = """modifiers:
  - !CAPruningModifier
      params: ['re:.*blocks.[0-9]+.mlp.(fc1|fc2).weight$']
      init_sparsity: 0.5
      final_sparsity: 0.5
      start_epoch: 0.0
      end_epoch: 1.0
      update_frequency: 1.0
      num_grads: 6
      fisher_block_size: 16
      damp: 1e-3
      traces_backup_dir: FOLDER
"""


def with_recipe(line: Line, folder: str, tmp_path: Path) -> list[str]:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("FOLDER", folder))
    changes = dict.fromkeys(("num_grads", "fisher_block_size", "damp"))
    return arguments(line, **changes, sparseml_recipe=path)


def test_a_recipe_s_folder_lies_in_that_of_the_experiment(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    monkeypatch.setattr(store.Store, "_sweep", lambda self: opened.append(self.root))
    one_shot_pruning.main(with_recipe(line, "state/here", tmp_path))
    assert set(opened) == {tmp_path / "trial" / "state" / "here"}


@pytest.mark.promise(
    "Hostile input",
    "A folder named in a recipe lies inside the experiment's folder; paths and links that lead out are refused",
)
@pytest.mark.parametrize("folder", ["/tmp/elsewhere", "../elsewhere", "a/../../elsewhere", ".", "link/elsewhere"])
def test_a_recipe_s_folder_that_leads_elsewhere(
    folder: str, line: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "trial").mkdir()
    (tmp_path / "trial" / "link").symlink_to(tmp_path)
    assert cli.run(one_shot_pruning.main, with_recipe(line, folder, tmp_path)) == 2
    assert f"traces_backup_dir: {folder} leads out of the experiment's folder" in capsys.readouterr().err
    assert not Path("/tmp/elsewhere").exists()
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("flag", [{"state_dir": "state"}, {"on_bad_batch": "skip"}, {"memory_budget": "8GiB"}])
def test_flags_that_mean_nothing_to_others_modifiers(flag: dict[str, str], line: Line) -> None:
    (name,) = flag
    words = arguments(line, method="magnitude", num_grads=None, fisher_block_size=None, damp=None, **flag)
    with pytest.raises(cli.UserError, match=rf"--{name.replace('_', '-')}.* not supported by .*agnitude"):
        one_shot_pruning.main(words)


def test_a_memory_budget(line: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one_shot_pruning.main(arguments(line, memory_budget=f"{WORKING_SET + 1_000_000}"))
    assert "2 groups of layers fit" in capsys.readouterr().err
    summary = json.loads((tmp_path / "trial" / "summary.json").read_text())
    assert [row["reached_prunable"] for row in summary["rows"]] == pytest.approx([0.0, 0.5, 0.8], abs=1e-3)


def test_a_foreign_state_folder_is_one_line(line: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    assert cli.run(one_shot_pruning.main, arguments(line, state_dir=tmp_path)) == 2
    error = capsys.readouterr().err
    assert "thesis.tex is not part of a capruner checkpoint; choose an empty or a new folder" in error
    assert "Traceback" not in error
