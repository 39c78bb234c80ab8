"""`mcore-rl verify golden`: every golden case through the library, vocab-parallel head included."""

from mcore_rl.verify.golden.command import CaseReport, Report, main, verify_golden

__all__ = ["CaseReport", "Report", "main", "verify_golden"]
