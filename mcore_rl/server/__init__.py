"""The embedded rollout server: SGLang's native HTTP API over `transformers`, on CPU or one GPU.

It speaks the subset that training uses, with the field names and reply shapes of SGLang 0.5.23, and refuses
the rest.
"""
