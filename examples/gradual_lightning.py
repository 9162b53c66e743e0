"""Prune gradually while Lightning trains: python examples/gradual_lightning.py

Needs lightning, and scikit-learn for the digits.
"""

import lightning
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from capruner.training.lightning import PruningCallback


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, y = batch
        return cross_entropy(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


lightning.seed_everything(0)
images, labels = load_digits(return_X_y=True)
data = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
module = Classifier()
pruning = PruningCallback({1: 0.5, 2: 0.75, 3: 0.9}, num_grads=28)  # {epoch: sparsity}
trainer = lightning.Trainer(
    max_epochs=5,
    callbacks=[pruning],
    accelerator="cpu",
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
)
trainer.fit(module, DataLoader(data, batch_size=64, shuffle=True))

with torch.no_grad():
    accuracy = (module(data.tensors[0]).argmax(1) == data.tensors[1]).float().mean().item()
print(f"{pruning.pruner.sparsity:.1%} of the weights are zero, training accuracy {accuracy:.1%}")
