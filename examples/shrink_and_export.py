"""Remove whole neurons, and export a smaller dense network to ONNX: python examples/shrink_and_export.py

Needs onnx and onnxruntime, and scikit-learn for the digits.
"""

import tempfile
from pathlib import Path

import onnxruntime
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
x, y = next(iter(DataLoader(test, batch_size=len(test))))


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    return 100 * (model(x).argmax(1) == y).float().mean().item()


model = network()
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for _ in range(10):
    for inputs, targets in DataLoader(train, batch_size=64, shuffle=True):
        optimizer.zero_grad()
        cross_entropy(model(inputs), targets).backward()
        optimizer.step()

loader = DataLoader(train, batch_size=8, shuffle=True)
small = capruner.shrink(model, loader, cross_entropy, macs=0.3, example_inputs=x[:1], units="neurons", num_grads=128)
print(small.report())
print(f"\ndense: {accuracy(model):.1f} %, shrunk: {accuracy(small.model):.1f} %")

with tempfile.TemporaryDirectory() as folder:
    weights, onnx = Path(folder) / "small.safetensors", Path(folder) / "small.onnx"
    small.save(weights)
    loaded = capruner.load_shrunk(weights, network())  # the dense architecture, with any weights
    torch.onnx.export(loaded, (x[:1],), str(onnx), dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "batch"}})
    session = onnxruntime.InferenceSession(str(onnx), providers=["CPUExecutionProvider"])
    (outputs,) = session.run(None, {"x": x.numpy()})
    print(f"largest difference between ONNX and torch: {abs(outputs - loaded(x).detach().numpy()).max():.1e}")
