"""Finding neurons and heads by trying: which outputs of a layer reach which inputs of the next.

A layer's outputs are neurons when each of them reaches exactly one input column of the layer that follows, at the same place, and nothing else in the network.
Three forward passes show it: changes of some outputs, at some places, must change the same entries of the next layer's input and no others; and with
that next layer's output held, they must not change the network's output. So activations, dropout and reshaping are allowed, whatever the code looks like,
and gates, norms and attention between the two layers are told apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from capruner.batches import call_model
from capruner.shrinking.units import Cut, Group, LeftAlone, own_weights

Hook = Callable[[nn.Module, Any, Any], Any]


class Probe:
    """Forward passes of a model in eval mode, with some layers watched or changed."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self.model, self.inputs = model, inputs
        self.names = {module: name for name, module in model.named_modules()}
        self.calls: list[nn.Linear] = []
        self.seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        linear: dict[nn.Module, Hook] = {
            module: self._watch for module in model.modules() if isinstance(module, nn.Linear)
        }
        self.output = self.run(linear)

    def _watch(self, module: Any, args: Any, out: Tensor) -> None:
        self.calls.append(module)
        self.seen[module] = (args[0].detach().clone(), out.detach().clone())

    def run(self, hooks: dict[nn.Module, Hook]) -> list[Tensor]:
        """The tensors of the model's output."""
        with hooked(hooks), torch.no_grad():
            output = call_model(self.model, self.inputs)
        return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]

    def input_of(self, reader: nn.Module, changes: dict[nn.Module, Tensor]) -> Tensor:
        """The input of ``reader`` when some layers' outputs have values added."""
        found: list[Tensor] = []

        def read(module: nn.Module, args: Any, out: Tensor) -> None:
            found.append(args[0])

        self.run({**_adding(changes), reader: read})
        return found[0]

    def only_through(self, reader: nn.Module, changes: dict[nn.Module, Tensor]) -> bool:
        """Whether changes of some layers' outputs reach the network's output through ``reader`` alone."""
        pinned = self.seen[reader][1]
        output = self.run({**_adding(changes), reader: lambda *_: pinned})
        return all(torch.equal(a, b) for a, b in zip(output, self.output, strict=True))


@contextmanager
def hooked(
    hooks: dict[nn.Module, Hook], before: dict[nn.Module, Callable[[nn.Module, Any], None]] | None = None
) -> Iterator[None]:
    """Forward hooks inside, and hooks that run ``before`` forward."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
    handles += [module.register_forward_pre_hook(hook) for module, hook in (before or {}).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adding(changes: dict[nn.Module, Tensor]) -> dict[nn.Module, Hook]:
    def adding(change: Tensor) -> Hook:
        return lambda module, args, out: out + change

    return {module: adding(change) for module, change in changes.items()}


def _change(like: Tensor, where: Tensor) -> Tensor:
    """Values to add to an output that no activation will miss: several times as large as it is."""
    size = like.abs().max() + 1
    return torch.zeros_like(like).masked_fill_(where, 1) * size


def neurons(probe: Probe) -> tuple[list[Group], list[LeftAlone]]:
    """The neurons of pairs of linear layers that follow each other, and the pairs within one module that are not an MLP."""
    groups, left = [], []
    for first, second in pairwise(probe.calls):
        name, reader = probe.names[first], probe.names[second]
        parent = name.rpartition(".")[0]
        together = parent == reader.rpartition(".")[0] and not _is_attention(probe.model.get_submodule(parent))
        fits = first.out_features == second.in_features
        if first is second or not (fits or together):
            continue
        reason = own_weights(probe.model, [name, reader])
        if not fits:
            reason = f"{reader} has {second.in_features} inputs for its {first.out_features} outputs, as behind a gate"
        reason = reason or _not_neurons(probe, first, second)
        if reason is None:
            each = torch.arange(first.out_features)[:, None]
            groups.append(Group(name, "neurons", (Cut(name, "out", each), Cut(reader, "in", each))))
        elif together:
            left.append(LeftAlone(name, reason))
    return groups, left


def _is_attention(module: nn.Module) -> bool:
    return "Attention" in type(module).__name__


def _not_neurons(probe: Probe, first: nn.Linear, second: nn.Linear) -> str | None:
    """Why the outputs of ``first`` are not neurons that ``second`` reads; None: they are."""
    name, reader = probe.names[first], probe.names[second]
    once = [probe.calls.count(module) == 1 for module in (first, second)]
    if not all(once):
        return f"{name if not once[0] else reader} is called more than once"
    out, into = probe.seen[first][1], probe.seen[second][0]
    if out.shape != into.shape:
        return f"its outputs are rearranged before {reader} reads them"
    where = torch.rand(out.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    where = where.to(out.device)
    change = _change(out, where)
    changed = probe.input_of(second, {first: change}) != into
    if not changed.any():
        return f"its outputs do not reach {reader}"
    if (changed & ~where).any():
        return f"its outputs are mixed with each other before {reader} reads them"
    if not probe.only_through(second, {first: change}):
        return f"its outputs are read by more than {reader}"
    return None


def heads(probe: Probe) -> tuple[list[Group], list[LeftAlone]]:
    """Heads of timm's attention with fused queries, keys and values; and the other attention modules, with the reason."""
    groups, left = [], []
    for name, module in probe.model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            left.append(
                LeftAlone(name, "nn.MultiheadAttention needs as many outputs as inputs, so no head can be removed")
            )
        elif _is_attention(module) and any(hasattr(module, key) for key in ("num_heads", "num_attention_heads")):
            reason = _not_heads(probe, name, module)
            if reason is None:
                groups.append(_heads_of(name, module))
            else:
                left.append(LeftAlone(name, reason))
    return groups, left


def _heads_of(name: str, module: nn.Module) -> Group:
    count, size = int(module.num_heads), int(module.head_dim)  # type: ignore[arg-type]
    each = torch.arange(count * size).view(count, size)
    rows = torch.cat([each, each + count * size, each + 2 * count * size], dim=1)
    cuts = [Cut(f"{name}.qkv", "out", rows), Cut(f"{name}.proj", "in", each)]
    if isinstance(getattr(module, "gate", None), nn.Linear):
        cuts.append(Cut(f"{name}.gate", "out", each))
    return Group(name, "heads", tuple(cuts), attention=name)


def _not_heads(probe: Probe, name: str, module: Any) -> str | None:
    """Why heads of an attention cannot be removed; None: they can."""
    qkv, proj = getattr(module, "qkv", None), getattr(module, "proj", None)
    kind = type(module).__name__
    inner = getattr(module, "attn_dim", None)
    if not isinstance(qkv, nn.Linear) or not isinstance(proj, nn.Linear) or inner is None:
        return f"{kind} is not timm's Attention with one layer for queries, keys and values and its own attn_dim"
    if qkv.out_features != 3 * inner or proj.in_features != inner or inner != module.num_heads * module.head_dim:
        return (
            f"{kind} has {qkv.out_features} queries, keys and values for {module.num_heads} heads of {module.head_dim}"
        )
    if reason := own_weights(probe.model, [f"{name}.qkv", f"{name}.proj"]):
        return reason
    if any(probe.calls.count(layer) != 1 for layer in (qkv, proj)):
        return "it is called more than once, or not at all"
    if module.num_heads == 1:
        return "it has a single head"
    out, into = probe.seen[qkv][1], probe.seen[proj][0]
    # As if with random numbers: one constant added to all keys would change no softmax.
    noise = torch.rand(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
    first = torch.zeros(3 * inner, dtype=torch.bool, device=out.device)
    first.view(3, module.num_heads, module.head_dim)[:, 0] = True
    changed = probe.input_of(proj, {qkv: noise * (out.abs().max() + 1) * first}) != into
    if changed[..., module.head_dim :].any():
        return f"its heads are mixed with each other before {name}.proj reads them"
    return None
