"""Gradual pruning in Lightning."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F


def test_without_lightning_the_import_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['lightning'] = sys.modules['pytorch_lightning'] = None\n"
        "try:\n    import capruner.training.lightning\nexcept ImportError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "needs Lightning: pip install lightning" in done.stdout


lightning = pytest.importorskip("lightning.pytorch", exc_type=ImportError)
pytestmark = pytest.mark.filterwarnings("ignore")

LEVELS = {0: 0.5, 2: 0.75}
KNOBS: dict[str, Any] = {"num_grads": 4, "progress": False}


class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 20), nn.ReLU(), nn.Linear(20, 5))
        self.counts: list[int] = []

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def training_step(self, batch: Any, index: int) -> Tensor:
        self.counts.append(zeros(self))
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


def zeros(model: nn.Module) -> int:
    return sum(int((p == 0).sum()) for p in model.parameters() if p.dim() == 2)


def fit(module: Module, callback: Any, folder: Path, epochs: int, checkpoint: str | None = None) -> Any:
    generator = torch.Generator().manual_seed(1)
    data = torch.utils.data.TensorDataset(
        torch.randn(24, 8, generator=generator), torch.randint(5, (24,), generator=generator)
    )
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback, lightning.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)],
    )
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=6), ckpt_path=checkpoint)
    return trainer


@pytest.mark.promise("Models and masks", "So does training with Lightning")
def test_prunes_holds_logs_and_resumes_bit_identically(tmp_path: Path) -> None:
    from capruner.training.lightning import PruningCallback

    module, callback = Module(), PruningCallback(LEVELS, **KNOBS)
    trainer = fit(module, callback, tmp_path, 4)
    assert module.counts == 8 * [130] + 8 * [195]
    assert zeros(module) == 195
    assert float(trainer.logged_metrics["sparsity"]) == pytest.approx(0.75)

    for epoch, first in ((0, 4 * [130] + 8 * [195]), (2, 4 * [195])):
        again = Module()
        fit(again, PruningCallback(LEVELS, **KNOBS), tmp_path / "again", 4, str(tmp_path / f"epoch={epoch}.ckpt"))
        assert again.counts == first
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))

    with pytest.raises(ValueError, match="resume with a new model object"):
        fit(module, callback, tmp_path / "back", 4, str(tmp_path / "epoch=0.ckpt"))
    with pytest.raises(ValueError, match="sparsity="):
        fit(Module(), PruningCallback({0: 0.6}, **KNOBS), tmp_path / "other", 4, str(tmp_path / "epoch=0.ckpt"))


def test_arguments_are_checked_before_training(tmp_path: Path) -> None:
    from capruner.training.lightning import PruningCallback

    with pytest.raises(ValueError, match="must rise"):
        PruningCallback({0: 0.9, 2: 0.5})
    module = Module()
    with pytest.raises(ValueError, match=r"no\.such"):
        fit(module, PruningCallback({3: 0.5}, params="no.such"), tmp_path, 1)
    assert module.counts == []


def test_own_calibration_data_and_a_second_fit(tmp_path: Path) -> None:
    from capruner.training.lightning import PruningCallback

    own = [(torch.randn(4, 8), torch.randint(5, (4,)))]
    module, callback = Module(), PruningCallback({0: 0.5}, own, F.cross_entropy, **KNOBS)
    fit(module, callback, tmp_path, 1)
    fit(module, callback, tmp_path, 2)  # from epoch 0 once more: nothing is due, masks hold
    assert module.counts == 12 * [130]
