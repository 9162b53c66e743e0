"""Correlation-aware second-order pruning (CAP, FastCAP) for PyTorch vision models.

    result = capruner.prune(model, batches, loss_fn, sparsity=[0.5, 0.75, 0.9])
    result.apply(model, 0.75)

The method reads top to bottom in ``core``: ``fisher``, ``elimination``, ``allocation``; ``pruning.prune`` puts it together. Nothing here needs SparseML:
the recipe modifiers live in ``capruner.sparseml``.
"""

from capruner import startup  # noqa: F401 - first: what it does has to happen before torch is imported, which takes seconds

# isort: split
from capruner.calibrated import CalibratedModel, Sparsest
from capruner.checkpoint import StateError, remove_state
from capruner.config import PruneConfig
from capruner.core.elimination import Elimination, compensate, eliminate
from capruner.core.numerics import NotPositiveDefiniteError
from capruner.deploy.sparse_file import load_sparse, save_sparse
from capruner.models.macs import MultiplyAdds, multiply_adds
from capruner.models.masking import MaskHandle, mask_model
from capruner.planning import Plan, plan
from capruner.pruning import calibrate, compensate_masks, prune
from capruner.refine.batchnorm import recalibrate_bn
from capruner.refine.distill import distill
from capruner.refine.divergence import measure_divergence
from capruner.refine.training import Distillation
from capruner.result import PruningResult, load_result
from capruner.shrinking.result import Shrunk, load_shrunk
from capruner.shrinking.run import shrink
from capruner.training.gradual import GradualPruner

__version__ = "0.1.0"

__all__ = [
    "CalibratedModel",
    "Distillation",
    "Elimination",
    "GradualPruner",
    "MaskHandle",
    "MultiplyAdds",
    "NotPositiveDefiniteError",
    "Plan",
    "PruneConfig",
    "PruningResult",
    "Shrunk",
    "Sparsest",
    "StateError",
    "__version__",
    "calibrate",
    "compensate",
    "compensate_masks",
    "distill",
    "eliminate",
    "load_result",
    "load_shrunk",
    "load_sparse",
    "mask_model",
    "measure_divergence",
    "multiply_adds",
    "plan",
    "prune",
    "recalibrate_bn",
    "remove_state",
    "save_sparse",
    "shrink",
]
