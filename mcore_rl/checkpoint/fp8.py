"""What the `delayed` recipe remembers, as pieces: scales and amax histories of Transformer Engine's modules.

Transformer Engine keeps them as a pickle per module (`_extra_state`); here they are the four tensors in it,
under the global name of the module's weight. Amax is reduced to its maximum over all ranks that hold a layer
before a scale is made of it, so that these tensors belong to the layer, whatever the layout.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.fp8_utils import get_fp8_context, get_fp8_recipe
from torch import Tensor

from mcore_rl.checkpoint.pieces import Piece
from mcore_rl.model.build import Model
from mcore_rl.model.weights_io import global_parameters
from mcore_rl.parallel.mesh import Mesh
from mcore_rl.precision import RECIPES

States = dict[str, dict[str, Tensor]]
"""global name of the weight -> Transformer Engine's name of the state -> the tensor itself"""


def fp8_pieces(model: Model, prefix: str = "") -> list[Piece]:
    """Scale [n] and amax history [1024, n] of every linear layer, forward and backward; collective.

    n is 3 forward (input, weight, output), 2 backward. Nothing where the recipe has no memory. A layer that
    has not run yet begins here as it would in its first forward pass.
    """
    if not model.config.fp8 or not RECIPES[str(model.config.fp8_recipe)].remembers:
        return []
    states = _states(model)
    _share_pending(states, model.mesh)
    return [
        Piece(
            f"fp8.{kind}.{prefix}{name}",
            tuple(tensor.shape),
            (0,) * tensor.dim(),
            tensor,
            _is_first(model, name),
        )
        for name, state in states.items()
        for kind, tensor in state.items()
    ]


def _states(model: Model) -> States:
    names = {id(parameter): name for name, parameter in global_parameters(model.unwrapped).items()}
    linears: list[Any] = [
        module
        for chunk in model.unwrapped
        for module in chunk.modules()
        if hasattr(module, "fp8_meta") and hasattr(module, "weight")  # attention is not asked for FP8
    ]
    recipe = get_fp8_recipe(model.config)
    # A new state looks at the recipe in force; without gradients, leaving it updates no scale.
    with torch.no_grad(), get_fp8_context(model.config):
        return {names[id(module.weight)]: _state(module, recipe) for module in linears}


def _state(module: Any, recipe: Any) -> dict[str, Tensor]:
    meta = module.fp8_meta
    if "scaling_fwd" not in meta:
        meta["num_gemms"] = 1
        module.init_fp8_meta_tensors(recipe)
    return {
        f"{kind}_{way}": getattr(meta[f"scaling_{way}"], kind)
        for way in ("fwd", "bwd")
        for kind in ("scale", "amax_history")
    }


def _share_pending(states: States, mesh: Mesh) -> None:
    """The amaxes since the last update of the scales (row 0), which every rank has of its own tokens.

    Scoring leaves some behind: Transformer Engine reduces them in the next training pass only. A maximum
    taken twice is the same, so that the run goes on as if nobody had looked.
    """
    mine = {(name, kind): rows[0].tolist() for name, kind, rows in _histories(states)}
    ranks: list[dict[tuple[str, str], list[float]]] = [{}] * mesh.layout.world_size
    dist.all_gather_object(ranks, mine, group=mesh.world)
    for name, kind, rows in _histories(states):
        found = [rank[name, kind] for rank in ranks if (name, kind) in rank]
        rows[0].copy_(torch.tensor(found).amax(dim=0))


def _histories(states: States) -> Iterable[tuple[str, str, Tensor]]:
    return (
        (name, kind, state[kind])
        for name, state in states.items()
        for kind in ("amax_history_fwd", "amax_history_bwd")
    )


def _is_first(model: Model, name: str) -> bool:
    """This rank answers for the layer: of the ranks that hold it, the first."""
    mesh = model.mesh
    if model.mapping.entry(name).is_expert:
        return mesh.expert_dp_rank == 0
    return mesh.tp_rank == mesh.cp_rank == mesh.dp_rank == 0
