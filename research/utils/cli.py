"""The command line helpers of ``capruner.cli``, and what has to be set before SparseML is imported."""

import os

from capruner.cli.arguments import KeyValues, Parser, UserError, add_model, describe, run

# Before anything imports SparseML: nobody receives its usage events any more.
os.environ.setdefault("NM_DISABLE_ANALYTICS", "1")

__all__ = ["KeyValues", "Parser", "UserError", "add_model", "describe", "run"]
