"""Prune a network to the 2:4 pattern of sparse tensor cores, and check every group: python examples/two_to_four.py

Of four consecutive weights along the inputs two remain. Needs scikit-learn for the digits.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import capruner

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
data = TensorDataset(torch.tensor(images / 16, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(labels))
model = nn.Sequential(
    nn.Conv2d(1, 16, 3, padding=1),
    nn.ReLU(),
    nn.Conv2d(16, 32, 3, stride=2, padding=1),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(32 * 16, 10),
)
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for _ in range(3):
    for x, y in DataLoader(data, batch_size=64, shuffle=True):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()

loader = DataLoader(data, batch_size=8, shuffle=True)
# One input channel cannot hold groups of four: without skip_unsupported the first layer is an error.
result = capruner.prune(model, loader, cross_entropy, mask_type="2:4", skip_unsupported=True, num_grads=128)
result.apply(model)  # 2:4 has one sparsity

for name, weight in model.named_parameters():
    if name not in result.masks():
        continue
    groups = weight.detach().movedim(1, -1).reshape(-1, 4)  # along the inputs, or the input channels
    remaining = (groups != 0).sum(dim=1)
    assert (remaining == 2).all()
    print(f"{name}: {len(groups)} groups of four, 2 weights remain in each")
for row in result.settings["left_dense"]:
    print(f"{row['name']} is dense: {row['reason']}")
