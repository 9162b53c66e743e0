"""Eval mode, or another, for a while, and the model as it was afterwards."""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

Mode = Literal["eval", "train", "as_is"]
_NORMS = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)
_DROPS = re.compile("Drop|StochasticDepth|BatchNorm")
"""Names of classes that models have of their own for the same: timm's DropPath, torchvision's StochasticDepth."""


@contextmanager
def eval_mode(model: nn.Module, mode: Mode = "eval") -> Iterator[None]:
    """Eval mode inside; afterwards, also after an exception, every module's mode and every buffer (BatchNorm statistics) is as before.

    Args:
        mode: ``"train"``: training mode, in which detection models compute their losses, but for normalization and dropout, which stay in eval mode: outputs
            are those of eval mode, and statistics do not move. ``"as_is"``: whatever mode each module is in.

    A buffer that ``forward`` replaces (a cache, a rotary table) is put back: the tensor, and its values. Compiled models run eagerly inside, as
    compiling them again for another mode, or under ``vmap``, takes longer than it saves.
    """
    states = [_State.of(module) for module in model.modules()]
    try:
        _set(model, mode)
        # Importing the compiler takes seconds; where it is not, nothing is compiled.
        with torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext():
            yield
    finally:
        try:
            _restore(states)
        except BaseException:  # a second interrupt: a restored module stays as it is when it is restored again
            _restore(states)
            raise


def _set(model: nn.Module, mode: Mode) -> None:
    if mode == "as_is":
        return
    model.train(mode == "train")
    for module in model.modules() if mode == "train" else ():
        if isinstance(module, _NORMS) or _DROPS.search(type(module).__name__):
            module.eval()


def _restore(states: list[_State]) -> None:
    for state in states:
        state.restore()


@contextmanager
def weights_restored(model: nn.Module) -> Iterator[None]:
    """Afterwards, also after an exception, every parameter has the values from before."""
    saved = [p.detach().clone() for p in model.parameters()]
    try:
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(model.parameters(), saved):
                p.copy_(value)


@dataclass
class _State:
    """What a forward pass may change about one module."""

    module: nn.Module
    training: bool
    buffers: dict[str, Tensor | None]
    values: dict[str, Tensor]
    attributes: dict[str, Any]

    @classmethod
    def of(cls, module: nn.Module) -> _State:
        buffers = dict(module._buffers)
        values = {name: buffer.detach().clone() for name, buffer in buffers.items() if buffer is not None}
        return cls(module, module.training, buffers, values, dict(module.__dict__) if buffers else {})

    @torch.no_grad()
    def restore(self) -> None:
        now = self.module._buffers
        if now.keys() != self.buffers.keys() or any(now[name] is not buffer for name, buffer in self.buffers.items()):
            now.clear()
            now.update(self.buffers)
            # What else the module knows (the length of a cache) describes its buffers, and has to fit them.
            for name in self.module.__dict__.keys() - self.attributes.keys():
                del self.module.__dict__[name]
            self.module.__dict__.update(self.attributes)
        for name, value in self.values.items():
            buffer = self.buffers[name]
            assert buffer is not None
            if buffer.shape != value.shape or buffer.dtype != value.dtype:
                buffer.data = value
            elif not buffer.is_meta and not torch.equal(buffer, value):
                buffer.copy_(value)
        self.module.training = self.training


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Restore the random generators of torch, NumPy and Python afterwards: loaders and augmentations draw from them."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
