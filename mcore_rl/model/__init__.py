"""Megatron-Core models: built, loaded, run, updated."""

from mcore_rl import before_megatron as before_megatron
