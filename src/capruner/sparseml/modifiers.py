"""The modifiers, as recipes name them."""

from __future__ import annotations

from sparseml.pytorch.sparsification.modifier import PyTorchModifierYAML

from capruner.sparseml.base import CorrelationAwareModifier


@PyTorchModifierYAML()
class CAPruningModifier(CorrelationAwareModifier, method="cap", globally=True):
    """CAP, the Correlation-Aware Pruner (arXiv 2210.09223), in one shot or gradually.

    | Sample yaml:
    |   !CAPruningModifier
    |       params: __ALL_PRUNABLE__
    |       init_sparsity: 0.5
    |       final_sparsity: 0.9
    |       start_epoch: 0.0
    |       end_epoch: 80.0
    |       update_frequency: 20.0
    |       num_grads: 4096
    |       fisher_block_size: 192

    Parameters: see :class:`CorrelationAwareModifier`. ``global_sparsity`` is True by default.
    """


@PyTorchModifierYAML()
class FastCAPruningModifier(CorrelationAwareModifier, method="fast_cap", globally=False):
    """FastCAP: one Fisher matrix per layer, for models whose Fisher blocks do not fit or when minutes matter.

    | Sample yaml:
    |   !FastCAPruningModifier
    |       params: __ALL_PRUNABLE__
    |       init_sparsity: 0.4
    |       final_sparsity: 0.9
    |       start_epoch: 0.0
    |       end_epoch: 8.0
    |       update_frequency: 2.0
    |       num_grads: 128
    |       damp: 0.5
    |       fisher_block_size: 192

    Parameters: see :class:`CorrelationAwareModifier`. ``global_sparsity`` is False by default, as published.
    """
