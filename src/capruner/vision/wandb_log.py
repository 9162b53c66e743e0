"""Log to Weights & Biases; if it fails, a run warns once and continues without it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

from capruner.cli.arguments import UserError


class WandbLog:
    """A run in Weights & Biases, as long as it responds. ``WANDB_PROJECT``, ``WANDB_NAME`` and ``WANDB_DIR`` override the options.

    Args:
        options: of ``wandb.init``.

    Attributes:
        id: of the run; None if there is none.

    Raises:
        UserError: the package is not installed.
    """

    def __init__(self, **options: Any) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError("--log-wandb needs the wandb package: pip install wandb") from error
        self._run: Any = None
        self.id: str | None = None
        options = {"project": "capruner"} | options
        for option in ("project", "name", "dir"):
            if os.environ.get(f"WANDB_{option.upper()}"):
                options.pop(option, None)
        try:
            self._run = wandb.init(**options)
            self.id = self._run.id
        except Exception as error:
            self._lost(error)

    def log(self, values: Mapping[str, Any], step: int | None = None) -> None:
        """Log the values that are not None."""
        if self._run is None:
            return
        try:
            self._run.log({key: value for key, value in values.items() if value is not None}, step=step)
        except Exception as error:
            self._lost(error)

    def finish(self) -> None:
        """End the run."""
        if self._run is not None:
            try:
                self._run.finish()
            except Exception as error:
                self._lost(error)

    def _lost(self, error: Exception) -> None:
        self._run = None
        reason = " ".join(str(error).split())[:200]
        print(
            f"warning: Weights & Biases does not answer ({type(error).__name__}: {reason}); continuing without it; everything is in the experiment's folder",
            file=sys.stderr,
        )
