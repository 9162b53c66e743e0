"""``report.html``: one self-contained page about an experiment or a sparse checkpoint, and the counts that it shows."""

from capruner.report.experiment import write_report
from capruner.report.macs import MultiplyAdds, multiply_adds

__all__ = ["MultiplyAdds", "multiply_adds", "write_report"]
