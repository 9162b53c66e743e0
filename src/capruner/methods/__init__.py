"""The pruning methods, by the name that :func:`capruner.prune` takes."""

from typing import Literal

from capruner.methods.base import LayerSolution, Method, Settings, SparsityLevel, Stopwatch, Target
from capruner.methods.cap import CAP
from capruner.methods.fast_cap import FastCAP
from capruner.methods.magnitude import Magnitude
from capruner.methods.woodfisher import OBS

MethodName = Literal["cap", "fast_cap", "obs", "magnitude"]

METHODS: dict[str, type[Method]] = {method.name: method for method in (CAP, FastCAP, OBS, Magnitude)}

__all__ = [
    "CAP",
    "METHODS",
    "OBS",
    "FastCAP",
    "LayerSolution",
    "Magnitude",
    "Method",
    "MethodName",
    "Settings",
    "SparsityLevel",
    "Stopwatch",
    "Target",
]
