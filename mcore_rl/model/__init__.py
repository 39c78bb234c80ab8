"""Megatron-Core models: built, loaded, run, updated."""

from mcore_rl import eager as eager  # before anything imports Megatron-Core
