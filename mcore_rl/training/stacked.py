"""What a model whose files stack the experts of a layer asks of the way to the servers."""

from __future__ import annotations

from mcore_rl.config import Config
from mcore_rl.errors import ConfigError
from mcore_rl.model.hf.architecture import Architecture
from mcore_rl.model.hf.tables import is_stacked
from mcore_rl.weights.encoding import check_encoding


def check_transport(arch: Architecture, config: Config) -> None:
    """Raises ConfigError for a transport that sends tensors one by one: no rank has a stacked one whole."""
    p = config.publish
    if not is_stacked(arch):
        return
    if p.transport != "disk" or p.replica is not None:
        what = "publish.replica" if p.transport == "disk" else f"publish.transport = {p.transport!r}"
        raise ConfigError(
            f"{what} is not supported with {arch.family!r}, whose files hold all experts of a layer in one "
            'tensor: set publish.transport = "disk", without publish.replica'
        )
    check_encoding(arch, p.quantize, "publish.quantize")
