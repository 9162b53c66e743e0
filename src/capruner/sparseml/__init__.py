"""CAP in SparseML 1.8 recipes: importing this package registers its modifiers for YAML.

    import capruner.sparseml
    manager = ScheduledModifierManager.from_yaml("recipe.yaml")     # with !CAPruningModifier in it

SparseML is end of life and wants Python < 3.12, numpy < 2 and setuptools < 81: ``pip install 'capruner[sparseml]'``.
"""

import os
import sys
import warnings

# SparseML sends usage events at import, without a time-out; nobody receives them any more.
os.environ.setdefault("NM_DISABLE_ANALYTICS", "1")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecations inside SparseML and what it imports
    try:
        from capruner.sparseml.modifiers import CAPruningModifier, FastCAPruningModifier
    except ImportError as error:
        raise ImportError(
            f"capruner.sparseml needs SparseML 1.8.0, which does not import on Python {sys.version_info.major}.{sys.version_info.minor} here "
            f"({error}): pip install 'capruner[sparseml]' (Python 3.11)"
        ) from error

__all__ = ["CAPruningModifier", "FastCAPruningModifier"]
