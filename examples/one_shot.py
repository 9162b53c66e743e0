"""Prune a small network on handwritten digits in one shot: python examples/one_shot.py

One calibration serves all sparsities. Needs scikit-learn for the digits.
"""

import copy

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset, random_split

import capruner

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
data = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
train, test = random_split(data, [1297, 500])
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    x, y = next(iter(DataLoader(test, batch_size=len(test))))
    return 100 * (model(x).argmax(1) == y).float().mean().item()


optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for _ in range(10):
    for x, y in DataLoader(train, batch_size=64, shuffle=True):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()

loader = DataLoader(train, batch_size=8, shuffle=True)  # each batch makes one gradient
print(capruner.plan(model, num_grads=128))  # what is pruned, and how much memory it takes

sparsities = [0.5, 0.75, 0.9, 0.95]
cap = capruner.prune(model, loader, cross_entropy, sparsity=sparsities, num_grads=128)
magnitude = capruner.prune(model, None, sparsity=sparsities, method="magnitude")

print(f"\ndense: {accuracy(model):.1f} %")
for sparsity in sparsities:
    values = []
    for result in (cap, magnitude):
        pruned = copy.deepcopy(model)
        result.apply(pruned, sparsity)
        values.append(accuracy(pruned))
    print(f"{sparsity:4.0%} of the weights removed: CAP {values[0]:.1f} %, magnitude {values[1]:.1f} %")
