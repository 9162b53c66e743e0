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
from capruner.shrinking.units import HEAD_COUNTS, Cut, Group, LeftAlone, own_weights

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
    """Heads of attention modules that have linear layers for queries, keys and values, fused or apart, and one that reads the heads' outputs; and the other
    attention modules, with the reason."""
    groups, left = [], []
    for name, module in probe.model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            left.append(
                LeftAlone(name, "nn.MultiheadAttention needs as many outputs as inputs, so no head can be removed")
            )
        elif _is_attention(module) and any(hasattr(module, key) for key in HEAD_COUNTS):
            found = _heads_of(probe, name, module)
            if isinstance(found, str):
                left.append(LeftAlone(name, found))
            else:
                groups.append(found)
    return groups, left


def _heads_of(probe: Probe, name: str, module: nn.Module) -> Group | str:
    """The heads of an attention, or why they cannot be removed."""
    own = {layer for layer in module.modules() if isinstance(layer, nn.Linear)}
    called = [layer for layer in probe.calls if layer in own]
    if len(called) < 2 or len(set(called)) < len(called):
        return "its linear layers are called more than once, or not at all"
    *writers, reader = called
    inner = reader.in_features
    count = next(int(getattr(module, key)) for key in HEAD_COUNTS if hasattr(module, key))
    parts = [layer.out_features // inner for layer in writers]  # 3: queries, keys and values in one layer
    if inner % count or sum(parts) < 3 or [part * inner for part in parts] != [w.out_features for w in writers]:
        kind, sizes = type(module).__name__, " + ".join(str(layer.out_features) for layer in writers)
        return (
            f"{kind} has {sizes} queries, keys and values for {count} heads and {inner} inputs of {probe.names[reader]}"
        )
    if reason := own_weights(probe.model, [probe.names[layer] for layer in called]):
        return reason
    if count == 1:
        return "it has a single head"
    each = torch.arange(inner).view(count, -1)
    rows = [torch.cat([each + k * inner for k in range(part)], dim=1) for part in parts]
    if not _independent(probe, dict(zip(writers, rows)), reader, each):
        return f"its heads are mixed with each other before {probe.names[reader]} reads them"
    cuts = [Cut(probe.names[layer], "out", positions) for layer, positions in zip(writers, rows)]
    return Group(name, "heads", (*cuts, Cut(probe.names[reader], "in", each)), attention=name)


def _independent(probe: Probe, rows: dict[nn.Linear, Tensor], reader: nn.Linear, columns: Tensor) -> bool:
    """Whether a change of the first head's rows reaches its columns of the reader alone."""
    changes: dict[nn.Module, Tensor] = {}
    for number, (layer, positions) in enumerate(rows.items()):
        out = probe.seen[layer][1]
        # As if with random numbers: one constant added to all keys would change no softmax.
        noise = torch.rand(out.shape, generator=torch.Generator().manual_seed(number)).to(out)
        first = torch.zeros(layer.out_features, dtype=torch.bool, device=out.device)
        first[positions[0].to(out.device)] = True
        changes[layer] = noise * (out.abs().max() + 1) * first
    changed = probe.input_of(reader, changes) != probe.seen[reader][0]
    others = torch.ones(reader.in_features, dtype=torch.bool, device=changed.device)
    others[columns[0].to(changed.device)] = False
    return bool(changed.any()) and not bool(changed[..., others].any())
