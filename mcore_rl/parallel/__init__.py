"""Layouts, process groups, and what is computed across ranks."""

from mcore_rl import before_megatron as before_megatron
