"""On-disk checkpoints: an interrupted calibration resumes with bit-identical results (on a CPU)."""

from capruner.checkpoint.run import Checkpoint, NoCheckpoint, RunCheckpoint
from capruner.checkpoint.store import StateError, remove_state

__all__ = ["Checkpoint", "NoCheckpoint", "RunCheckpoint", "StateError", "remove_state"]
