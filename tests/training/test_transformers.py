"""Gradual pruning in Hugging Face's Trainer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F


def test_without_transformers_the_import_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "try:\n    import capruner.training.transformers\nexcept ImportError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "needs Hugging Face's transformers: pip install transformers" in done.stdout


transformers = pytest.importorskip("transformers", exc_type=ImportError)
pytest.importorskip("accelerate", exc_type=ImportError)
pytestmark = pytest.mark.filterwarnings("ignore")

LEVELS = {0: 0.5, 2: 0.75}
KNOBS: dict[str, Any] = {"num_grads": 4, "progress": False}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 5))
        self.counts: list[int] = []

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if self.training:
            self.counts.append(zeros(self))
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def zeros(model: nn.Module) -> int:
    return sum(int((p == 0).sum()) for p in model.parameters() if p.dim() == 2)


def trainer_of(model: Net, callback: Any, folder: Path, epochs: int = 4, **arguments: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    data = [
        {"x": torch.randn(8, generator=generator), "labels": torch.randint(5, (), generator=generator)}
        for _ in range(24)
    ]
    args = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=6,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        save_strategy="epoch",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **arguments,
    )
    return transformers.Trainer(model, args, train_dataset=data, eval_dataset=data, callbacks=[callback])


@pytest.mark.promise("Models and masks", "So does training with Hugging Face's `Trainer`")
def test_prunes_holds_logs_and_resumes_bit_identically(tmp_path: Path) -> None:
    from capruner.training.transformers import MASKS, PruningCallback

    model = Net()
    trainer = trainer_of(model, PruningCallback(LEVELS, **KNOBS), tmp_path / "run")
    trainer.train()
    assert model.counts == 8 * [130] + 8 * [195]
    assert zeros(model) == 195
    logged = [(row["epoch"], row["sparsity"]) for row in trainer.state.log_history if "sparsity" in row]
    assert logged == [(0, 0.5), (2.0, 0.75)]

    for step, delete, expected in ((4, False, 4 * [130] + 8 * [195]), (12, True, 4 * [195])):
        checkpoint = tmp_path / "run" / f"checkpoint-{step}"
        assert (checkpoint / MASKS).stat().st_size < 2000
        if delete:  # killed before it was written
            (checkpoint / MASKS).unlink()
        again = Net()
        trainer_of(again, PruningCallback(LEVELS, **KNOBS), tmp_path / f"{step}").train(str(checkpoint))
        assert again.counts == expected
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_resuming_needs_the_right_masks(tmp_path: Path) -> None:
    from capruner.training.transformers import PruningCallback

    model, callback = Net(), PruningCallback(LEVELS, **KNOBS)
    trainer = trainer_of(model, callback, tmp_path)
    trainer.train()
    with pytest.raises(ValueError, match="resume with a new model object"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    with pytest.raises(ValueError, match="sparsity="):
        trainer_of(Net(), PruningCallback({0: 0.6}, **KNOBS), tmp_path).train(str(tmp_path / "checkpoint-4"))
    (tmp_path / "checkpoint-4").rename(tmp_path / "moved")
    weights = tmp_path / "moved" / "model.safetensors"
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    tensors["net.0.weight"][tensors["net.0.weight"] != 0] *= 0  # zeros that are not those of the masks
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"set TrainingArguments\.resume_from_checkpoint"):
        trainer_of(Net(), PruningCallback(LEVELS, **KNOBS), tmp_path).train(str(tmp_path / "moved"))
    again = Net()
    args = {"resume_from_checkpoint": str(tmp_path / "moved")}
    trainer_of(again, PruningCallback(LEVELS, **KNOBS), tmp_path / "x", **args).train(str(tmp_path / "moved"))
    assert zeros(again) == 195


@pytest.mark.promise(
    "Models and masks", "The best checkpoint of Hugging Face's `Trainer` has the sparsity that was reached"
)
def test_the_best_checkpoint_is_one_of_the_sparsity_reached(tmp_path: Path) -> None:
    from capruner.training.transformers import PruningCallback

    model = Net()
    arguments = {"load_best_model_at_end": True, "metric_for_best_model": "worse", "greater_is_better": True}
    trainer = trainer_of(model, PruningCallback(LEVELS, **KNOBS), tmp_path, eval_strategy="epoch", **arguments)
    trainer.compute_metrics = lambda _: {"worse": -trainer.state.global_step}  # the first epoch of all is the best
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-12")
    assert zeros(model) == 195


def test_arguments_are_checked_when_the_trainer_is_constructed(tmp_path: Path) -> None:
    from capruner.training.transformers import PruningCallback

    with pytest.raises(ValueError, match="must rise"):
        PruningCallback({0: 0.9, 2: 0.5})
    with pytest.raises(ValueError, match=r"no\.such"):
        trainer_of(Net(), PruningCallback({3: 0.5}, params="no.such"), tmp_path)
