"""Runs the real Megatron-Core on CPU and gloo, unchanged on CUDA and NCCL.

Megatron-Core names CUDA in its source: `device="cuda"` literals, `torch.cuda.current_device()`, streams,
generators, type strings. `install()` answers those calls on a machine without CUDA, once, before the first
use of Megatron-Core; where CUDA is present it only meets the differences listed in versions.py.

For the whole process it replaces what would need CUDA: of `torch.cuda` the functions current_device,
synchronize, get_rng_state, manual_seed, current_stream, default_stream and stream and the classes Stream and
Event; of `torch.Tensor` the methods cuda, pin_memory, record_stream and type (which answers only Megatron's
optimizers otherwise). torch's factories stay: literals are redirected by a stand-in for the name `torch`
INSIDE the modules of `TORCH_FACTORY_MODULES`, since wrapping them globally silently corrupts other libraries
(transformers' rotary tables, logits off by 0.3).
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from typing import Any

import torch

from mcore_rl.model import again, versions
from mcore_rl.model.rotary import turn

TORCH_FACTORY_MODULES = (
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.optimizer.optimizer",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.grad_scaler",
    "megatron.core.transformer.utils",
    "megatron.core.transformer.moe.moe_utils",
    "megatron.core.models.common.embeddings.rope_utils",
    "megatron.core.tensor_parallel.data",
    "megatron.core.utils",
    "megatron.core.dist_checkpointing.exchange_utils",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
)
"""Modules that hold `device="cuda"` or `pin_memory=True` literals."""

_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "empty_like", "zeros_like", "ones_like")
_installed = False


def install() -> None:
    """Prepare Megatron-Core for this machine; idempotent.

    Raises:
        ConfigError: megatron-core is missing or of a version whose internals are unknown to this module.
    """
    global _installed
    if _installed:
        return
    versions.check()
    versions.install()
    if torch.cuda.is_available():
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    else:
        for fix in (*FIXES, *SAVINGS):
            fix()
    _installed = True


def device() -> torch.device:
    """Where this rank computes."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def backend() -> str:
    """The torch.distributed backend of this machine."""
    return "nccl" if torch.cuda.is_available() else "gloo"


# --- the fixes, each with the call it answers ---------------------------------------------------------


def _module(name: str) -> Any:
    """A module whose names are replaced; Any, since a type checker holds them for constants."""
    return importlib.import_module(name)


class _TorchWithCpuFactories(types.ModuleType):
    """`torch`, except that factories take device="cuda" as the CPU and ignore pin_memory."""

    def __getattr__(self, name: str):
        value = getattr(torch, name)
        return _on_cpu(value) if name in _FACTORIES else value


def _on_cpu(factory):
    def create(*args, **kwargs):
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return create


def redirect_literal_devices() -> None:
    """`device="cuda"` and `pin_memory=True` literals, in Megatron's own modules only."""
    stand_in = _TorchWithCpuFactories("torch")
    for name in TORCH_FACTORY_MODULES:
        _module(name).torch = stand_in


def answer_current_device() -> None:
    """`torch.cuda.current_device()` as a tensor's device: TP layers, mappings, p2p, rotary, router."""
    torch.cuda.current_device = lambda: torch.device("cpu")


def keep_tensors_on_cpu() -> None:
    """`.cuda()` and `.pin_memory()`: CP rotary slices, distributed-optimizer checkpoints."""
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self


def skip_synchronize() -> None:
    """`torch.cuda.synchronize()`: p2p, timers, checkpoint."""
    torch.cuda.synchronize = lambda device=None: None


def use_cpu_generator() -> None:
    """CUDA generator states that Megatron's RNG tracker saves, forks and restores (dropout, recompute)."""
    random = _module("megatron.core.tensor_parallel.random")
    torch.cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    torch.cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda new_state, *args, **kwargs: torch.set_rng_state(new_state)


def name_cuda_types() -> None:
    """`tensor.type() == "torch.cuda.FloatTensor"` comparisons in the optimizers."""
    original = torch.Tensor.type

    def type_name(self, *args, **kwargs):
        answer = original(self, *args, **kwargs)
        asked_by = sys._getframe(1).f_globals.get("__name__", "")
        if isinstance(answer, str) and asked_by.startswith("megatron.core.optimizer"):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    torch.Tensor.type = type_name  # pyright: ignore[reportAttributeAccessIssue]


class _NullStream:
    """A stream or event on a device whose work is always finished."""

    def __init__(self, *args, **kwargs): ...
    def __enter__(self):
        return self

    def __exit__(self, *exc):
        return False

    def _nothing(self, *args, **kwargs):
        return None

    wait_stream = wait_event = synchronize = record = wait = _nothing

    def record_event(self, event=None):
        return self


def null_streams() -> None:
    """Streams and events of the MoE dispatcher, shared-expert overlap, and 0.19.2's DDP."""
    torch.cuda.Stream = torch.cuda.Event = _NullStream
    torch.cuda.stream = _NullStream
    torch.cuda.current_stream = torch.cuda.default_stream = lambda device=None: _NullStream()
    torch.Tensor.record_stream = lambda self, stream: None  # pyright: ignore[reportAttributeAccessIssue]


def list_splits_on_host() -> None:
    """The all-to-all's split sizes as numpy, which Megatron makes of CUDA tensors only."""
    dispatcher = _module("megatron.core.transformer.moe.token_dispatcher")
    original = dispatcher.maybe_move_tensor_to_cpu

    def move(tensor, as_numpy=False, record_stream=False):
        moved = original(tensor, as_numpy, record_stream)
        return moved.numpy() if as_numpy and torch.is_tensor(moved) else moved

    dispatcher.maybe_move_tensor_to_cpu = move


def skip_exchanges_of_one_rank() -> None:
    """DDP's reduce-scatter and all-gather over one rank: gloo would copy all gradients through itself."""
    buffers = _module("megatron.core.distributed.param_and_grad_buffer")
    for name in ("dist_reduce_scatter_func", "dist_all_gather_func"):
        setattr(buffers, name, _between_ranks(getattr(buffers, name)))


def _between_ranks(exchange):
    def call(output, given, *, group, **options):
        if group.size() > 1:
            return exchange(output, given, group=group, **options)
        if output.data_ptr() != given.data_ptr():  # a shard of one is the whole buffer itself
            output.copy_(given)
        return None

    return call


def differentiate_swiglu_in_place() -> None:
    """The SwiGLU's backward pass, which a GPU has as one kernel: seven tensors of its width, one by one."""
    _module("megatron.core.fusions.fused_bias_swiglu").swiglu_back = swiglu_gradient


def swiglu_gradient(grad: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """d(silu(gate) * up) [..., 2 * width] from its gradient [..., width]; no memory but for the answer."""
    gate, up = gate_up.chunk(2, -1)
    out = torch.empty_like(gate_up)
    of_gate, of_up = out.chunk(2, -1)
    torch.sigmoid(gate, out=of_up)
    torch.sub(torch.ones((), dtype=out.dtype), of_up, out=of_gate)
    of_gate.mul_(gate).add_(1).mul_(of_up).mul_(up).mul_(grad)  # silu' = s (1 + gate (1 - s))
    of_up.mul_(gate).mul_(grad)
    return out


def turn_by_angles_once() -> None:
    """Cosines and sines of the same angles in every layer, for queries and for keys, kept by each of them."""
    rope = _module("megatron.core.models.common.embeddings.rope_utils")
    original = rope._apply_rotary_pos_emb_bshd

    def turned(t, freqs, rotary_interleaved=False, mscale=1.0, **kinds):
        if any(kinds.values()):  # other orders of the channels
            return original(t, freqs, rotary_interleaved, mscale=mscale, **kinds)
        width = freqs.shape[-1]
        if width == t.shape[-1]:
            return turn(t, freqs, interleaved=rotary_interleaved, scale=mscale)
        part = turn(t[..., :width], freqs, interleaved=rotary_interleaved, scale=mscale)
        return torch.cat((part, t[..., width:]), dim=-1)

    rope._apply_rotary_pos_emb_bshd = turned


def remember_swiglus() -> None:
    """The product of a SwiGLU, which the linear layer behind it would keep beside its factors."""
    for name in ("mlp", "moe.shared_experts"):
        module = _module(f"megatron.core.transformer.{name}")
        module.bias_swiglu_impl = again.remembering(module.bias_swiglu_impl)


def leave_the_compiler_out() -> None:
    """Half a CPU-second: the first optimizer imports torch's compiler, to tell it to leave optimizers be."""
    for optimizer in (torch.optim.Adam, torch.optim.SGD):
        step: Any = optimizer.step
        optimizer.step = torch.no_grad()(step.__wrapped__)  # pyright: ignore[reportAttributeAccessIssue]
    base: Any = torch.optim.Optimizer
    asking = [base.add_param_group, base.zero_grad, base.state_dict, base.load_state_dict]
    for function in (*asking, _module("torch.optim.adam").adam):
        vars(function.__wrapped__)["__dynamo_disable"] = function.__wrapped__


FIXES = (
    redirect_literal_devices,
    answer_current_device,
    keep_tensors_on_cpu,
    skip_synchronize,
    use_cpu_generator,
    name_cuda_types,
    null_streams,
    list_splits_on_host,
)

SAVINGS = (
    skip_exchanges_of_one_rank,
    differentiate_swiglu_in_place,
    turn_by_angles_once,
    remember_swiglus,
    leave_the_compiler_out,
)
"""what a CPU need not do; without them the same numbers come later"""
