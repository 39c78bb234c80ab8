"""mcore_rl: reinforcement learning for large language models on Megatron-Core."""

import warnings

__version__ = "0.1.0"

# Megatron-Core warns at import, on every rank, that Apex and Transformer Engine are absent.
for _text in (".*Apex.* not installed.*", "Apex is not installed.*"):
    warnings.filterwarnings("ignore", message=_text)
