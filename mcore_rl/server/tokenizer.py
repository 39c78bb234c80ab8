"""The tokenizer of a served model; a client that needs no more of the server imports this alone."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mcore_rl.errors import ConfigError


def load_tokenizer(model_dir: Path) -> PreTrainedTokenizerBase | None:
    """None without tokenizer files: token ids in, token ids out."""
    if not any((model_dir / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    try:
        return AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False, local_files_only=True)
    except (ValueError, OSError, KeyError, TypeError, ImportError) as error:
        raise ConfigError(f"{model_dir}: transformers cannot load its tokenizer: {error}") from error
