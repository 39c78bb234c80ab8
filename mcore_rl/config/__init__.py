"""The configuration of a run: frozen sections from TOML and dotted overrides, checked before anything starts.

Only training, launch, evaluate, plan, doctor, talk and __main__ read it; below them functions take the
numbers they need.
"""

from mcore_rl.config.config import Config, is_loopback, notes, warnings
from mcore_rl.config.file import load_config, to_toml

__all__ = ["Config", "is_loopback", "load_config", "notes", "to_toml", "warnings"]
