"""Prune gradually while Hugging Face's Trainer trains: python examples/gradual_trainer.py

Needs transformers and accelerate, and scikit-learn for the digits.
"""

import tempfile

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments, set_seed

from capruner.training.transformers import PruningCallback


class Classifier(nn.Module):
    """Any model that returns its loss, as those of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(pixels)
        return {"loss": cross_entropy(logits, labels), "logits": logits}


set_seed(0)
images, labels = load_digits(return_X_y=True)
data = [
    {"pixels": pixels, "labels": label}
    for pixels, label in zip(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels), strict=True)
]
model = Classifier()
pruning = PruningCallback({1: 0.5, 2: 0.75, 3: 0.9}, num_grads=28)  # {epoch: sparsity}
with tempfile.TemporaryDirectory() as folder:
    args = TrainingArguments(
        output_dir=folder,
        num_train_epochs=5,
        per_device_train_batch_size=64,
        learning_rate=3e-3,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model, args, train_dataset=data, callbacks=[pruning])
    trainer.train()

with torch.no_grad():
    predictions = model(torch.stack([row["pixels"] for row in data]), torch.tensor(labels))["logits"].argmax(1)
accuracy = (predictions == torch.tensor(labels)).float().mean().item()
print(f"{pruning.pruner.sparsity:.1%} of the weights are zero, training accuracy {accuracy:.1%}")
