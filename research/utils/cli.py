"""The command line helpers of ``capruner.cli``, and what has to be set before SparseML is imported."""

import importlib
import os
import sys

from capruner.cli.arguments import KeyValues, Parser, UserError, add_model, describe, run

# Before anything imports SparseML: nobody receives its usage events any more.
os.environ.setdefault("NM_DISABLE_ANALYTICS", "1")

__all__ = ["KeyValues", "Parser", "UserError", "add_model", "describe", "exit_without_sparseml", "run"]


def exit_without_sparseml() -> None:
    """For scripts that are nothing without it: one line that says why it cannot be imported, and exit status 2."""
    try:
        importlib.import_module("capruner.sparseml")
    except ImportError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
