"""The trainer's weights on their way to servers and files.

buckets.py     the exporter: which rank sends which Hugging Face tensor in which bucket
encoding.py    tensors as they are, or in FP8
transport.py   what all ways have in common: disk.py, shared.py, broadcast.py, online.py
delta.py, follow.py   copies on other machines, kept up by what changed
"""
