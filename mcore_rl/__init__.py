"""mcore_rl: reinforcement learning for large language models on Megatron-Core."""

import warnings

__version__ = "0.1.0"

# What libraries say to their own developers, on every rank: Apex and Transformer Engine are absent, an unset
# field has a deprecated default, and collectives that Megatron-Core calls have new names in newer torch.
for _text in (
    ".*Apex.* not installed.*",
    "Apex is not installed.*",
    "full scope is deprecated",
    # model.platform sets what this asks for
    "When using (async grad allreduce|sequence parallelism) it is recommended",
    "`torch.distributed.(reduce_scatter|all_gather_into)_tensor` is deprecated",
):
    warnings.filterwarnings("ignore", message=_text)
# Its optimizer looks for a gradient on parameters that are views of one buffer.
warnings.filterwarnings("ignore", "The .grad attribute of a Tensor", module="megatron.core.optimizer")
