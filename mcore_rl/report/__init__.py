"""`mcore-rl report`: one self-contained page about one run, or several runs over each other."""

from mcore_rl.report.page import write_report

__all__ = ["write_report"]
