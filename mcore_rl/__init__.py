"""mcore_rl: reinforcement learning for large language models on Megatron-Core."""

import warnings

__version__ = "0.1.0"

# What libraries say to their own developers, on every rank: Apex and Transformer Engine are absent, an unset
# field has a deprecated default, and a collective that Megatron-Core calls has a new name in newer torch.
for _text in (
    ".*Apex.* not installed.*",
    "Apex is not installed.*",
    "full scope is deprecated",
    "`torch.distributed.reduce_scatter_tensor` is deprecated",
):
    warnings.filterwarnings("ignore", message=_text)
