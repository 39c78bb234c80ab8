"""torch_dist -> Hugging Face: each parameter is read at whatever layout it was saved, split, and appended."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from mcore_rl.checkpoint import manifest
from mcore_rl.convert.output import ConversionProgress
from mcore_rl.errors import CheckpointError, ConfigError
from mcore_rl.model.hf.architecture import read_architecture
from mcore_rl.model.hf.content import model_content
from mcore_rl.model.hf.files import (
    EMBEDDING,
    INDEX,
    Form,
    SafetensorsWriter,
    read_side_files,
    write_side_files,
)
from mcore_rl.model.hf.parameters import CriticParameterMap, ParameterMap
from mcore_rl.model.hf.stacked import ordered, whole_of
from mcore_rl.model.hf.torch_dist import CRITIC, holds_classifier, torch_dist_reader, torch_dist_types
from mcore_rl.weights.encoding import PLAIN, Encoding, encoded_forms


def write_hf(
    source: Path,
    directory: Path,
    *,
    config: Path,
    shard_bytes: int,
    encoding: Encoding = PLAIN,
    prefix: str = "",
) -> ConversionProgress:
    """Write the model part of the torch_dist `source` into the empty `directory` as safetensors.

    Args:
        config: HF directory whose config.json and tokenizer go with the weights.
        shard_bytes: a file holds no more, unless a single tensor does.
        encoding: what the tensors become (weights/encoding.py).
        prefix: torch_dist.CRITIC for the critic in the place of the policy.

    Raises:
        ConfigError: the parameters are not those of config.json.
        CheckpointError: `source` is damaged.
    """
    _check_config(source, config, prefix)
    if shard_bytes < 1:
        raise ConfigError(f"--shard-gb: {shard_bytes} bytes are too few for a file")
    arch = read_architecture(config)
    classifier = holds_classifier(source, prefix)
    if prefix and not classifier:
        raise ConfigError(f"--critic: {source} holds none; only the checkpoint of a run with a critic does")
    mapping = (CriticParameterMap if classifier else ParameterMap)(arch, arch.vocab)
    read = torch_dist_reader(source, mapping, prefix)
    types = torch_dist_types(source, mapping, prefix)
    forms = encoded_forms(mapping, encoding, types)
    progress = write_shards(directory, forms, _Encoded(mapping, encoding, read), shard_bytes)
    quantization = encoding.config(mapping)
    side = read_side_files(config)
    write_side_files(side, directory, types[EMBEDDING], quantization, classifier=classifier)
    return progress


def write_shards(
    directory: Path,
    forms: dict[str, Form],
    tensors: Callable[[Iterable[str]], Iterator[tuple[str, Tensor]]],
    shard_bytes: int,
) -> ConversionProgress:
    """Write the tensors of `forms`, which `tensors` gives in the order that it is asked for, and an index."""
    shards = _shards(forms, shard_bytes)
    progress = ConversionProgress(len(forms))
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with SafetensorsWriter(directory / file, names) as writer:
            for name, tensor in tensors(names):
                writer.write(name, tensor)
                progress.add(tensor.nbytes)
                weight_map[whole_of(name)] = file
    index = {"metadata": {"total_size": progress.bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=1))
    return progress


def _check_config(source: Path, config: Path, prefix: str) -> None:
    """Raises ConfigError where the run that saved `source` had a model with another config.json."""
    try:
        inputs = manifest.read(source).document.get("inputs")
    except (ConfigError, CheckpointError):  # Megatron's own has no manifest; what is damaged is refused later
        return
    known = inputs if isinstance(inputs, dict) else {}
    of_critic = "critic.path" in known and prefix == CRITIC
    then = known.get("critic.path" if of_critic else "model.path")
    now = model_content(config, weights=False).get("config.json")
    if isinstance(then, dict) and then.get("config.json", now) != now:
        raise ConfigError(
            f"{config / 'config.json'} is not the one that the run of {source} had: it would describe a "
            "model of which these are no weights. Name "
            + ("critic.path" if of_critic else "a directory that the run published (RUN_DIR/weights)")
        )


class _Encoded:
    """Reads HF tensors and encodes them, each once for all that it becomes within a file."""

    def __init__(self, mapping: ParameterMap, encoding: Encoding, read: Callable[[str], Tensor]) -> None:
        self._encoding, self._read = encoding, read
        self._rules = {name: entry.rule for entry in mapping.entries() for name in entry.hf}
        of_any_type = ((1, 1), torch.float32)
        self._sources = {key: name for name in self._rules for key in self._forms(name, of_any_type)}

    def _forms(self, name: str, form: Form) -> dict[str, Form]:
        return self._encoding.forms(self._rules[name], name, form)

    def __call__(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of `names`, in their order."""
        made: dict[str, Tensor] = {}
        for key in names:
            if key not in made:
                name = self._sources[key]
                whole = self._read(name)
                forms = self._forms(name, (tuple(whole.shape), whole.dtype))
                made = {name: whole}
                if forms != {name: (tuple(whole.shape), whole.dtype)}:
                    made = {key: torch.empty(shape, dtype=dtype) for key, (shape, dtype) in forms.items()}
                    self._encoding.encode(name, whole, made)
            yield key, made.pop(key)


def _shards(forms: dict[str, Form], limit: int) -> list[dict[str, Form]]:
    """In order, into files of at most `limit` bytes; all pieces of a tensor into one."""
    shards: list[dict[str, Form]] = [{}]
    held = 0
    for names in ordered(forms).values():
        size = sum(torch.Size(forms[name][0]).numel() * forms[name][1].itemsize for name in names)
        if shards[-1] and held + size > limit:
            shards.append({})
            held = 0
        shards[-1] |= {name: forms[name] for name in names}
        held += size
    return shards
