"""Several processes: who owns which block, collectives, and errors that name the process that failed."""

from capruner.distributed.agreement import agree, agreeing
from capruner.distributed.collectives import Processes, SingleProcess, processes
from capruner.distributed.failures import PeerError
from capruner.distributed.partition import Partition

__all__ = ["Partition", "PeerError", "Processes", "SingleProcess", "agree", "agreeing", "processes"]
