"""Layouts, process groups, and what is computed across ranks."""

from mcore_rl import eager as eager  # before anything imports Megatron-Core
