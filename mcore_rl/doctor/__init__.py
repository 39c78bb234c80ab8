"""`mcore-rl doctor`: what would stop a run, found before it starts, each finding with its remedy."""

from mcore_rl.doctor.examine import examine, main
from mcore_rl.doctor.finding import Finding, Level

__all__ = ["Finding", "Level", "examine", "main"]
