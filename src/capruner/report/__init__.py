"""``report.html``: one self-contained page about an experiment or a sparse checkpoint."""

from capruner.report.experiment import write_report

__all__ = ["write_report"]
