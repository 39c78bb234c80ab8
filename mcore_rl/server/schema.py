"""What the HTTP API accepts: the fields of SGLang 0.5.23 that the embedded server honours.

A field that SGLang has and this server has not is accepted only with a value that asks for nothing; any other
value, and any unknown field, is refused with a reason.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    FailFast,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

_SHOWN = 5
"""errors of a body, and names of unknown fields"""
_SHOWN_CHARS = 300
_Entry = TypeVar("_Entry")


class _FirstError(FailFast):
    """A list is checked up to its first wrong entry, since an error costs more than an entry."""

    def __hash__(self) -> int:  # a member of a union must have one
        return hash(_FirstError)


_Listed = Annotated[list[_Entry], _FirstError()]
_Name = Annotated[str, StringConstraints(max_length=1000)]
"""What replies repeat for every token or sequence."""

MAX_SEQUENCES = 4096
"""responses of one request"""

NEUTRAL_SAMPLING: Mapping[str, tuple[object, ...]] = {
    "stop": (None, [], ""),
    "stop_regex": (None, [], ""),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "beam_width": (None,),
    "json_schema": (None,),
    "regex": (None,),
    "ebnf": (None,),
    "structural_tag": (None,),
    "logit_bias": (None, {}),
    "custom_params": (None,),
    "watermark": (None, False),
    "spaces_between_special_tokens": (True,),
    "no_stop_trim": (False,),
}
NEUTRAL_GENERATE: Mapping[str, tuple[object, ...]] = {
    "return_text_in_logprobs": (False,),
    "return_sampling_mask": (False,),
    "sampling_logprobs_mode": (None, "selected"),
    "return_hidden_states": (False,),
    "routed_experts_start_len": (0,),
    "return_indexer_topk": (False,),
    "return_flat_raw_top_logprobs": (False,),
    "return_flat_output_top_logprobs": (False,),
    "log_metrics": (True, False),
} | dict.fromkeys(
    (
        *(
            "input_embeds",
            "image_data",
            "video_data",
            "audio_data",
            "session_id",
            "session_params",
            "lora_path",
        ),
        *("custom_logit_processor", "routed_dp_rank", "data_parallel_rank", "conversation_id"),
        *(
            "priority",
            "extra_key",
            "max_thinking_tokens",
            "bootstrap_host",
            "bootstrap_port",
            "bootstrap_room",
        ),
        "custom_labels",
    ),
    (None,),
)


class RequestError(ValueError):
    """The request cannot be served as it stands: HTTP 400 {"error": {"message": ...}}."""


def supported(
    fields: Mapping[str, Any], neutral: Mapping[str, tuple[object, ...]], where: str
) -> dict[str, Any]:
    """`fields` without the neutral ones. Raises RequestError for a value that would have to act."""
    acting = [name for name in fields.keys() & neutral.keys() if fields[name] not in neutral[name]]
    if acting:
        names = ", ".join(f"{where}{name}" for name in sorted(acting))
        raise RequestError(
            f"{names}: not supported by the embedded server of mcore_rl; drop it or use SGLang"
        )
    return {name: value for name, value in fields.items() if name not in neutral}


def check_names(fields: Mapping[str, Any], model: type[BaseModel], where: str = "") -> None:
    """Raises RequestError for fields that `model` lacks, in one message however many there are."""
    unknown = [name for name in fields if name not in model.model_fields]
    if unknown:
        names = ", ".join(f"{where}{name[:_SHOWN_CHARS]}" for name in unknown[:_SHOWN])
        more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
        raise RequestError(f"{names}{more}: not a field of this request; drop it")


def reasons(error: ValidationError) -> str:
    """The first errors of a body, as SGLang writes them, without what was sent."""
    details = error.errors(include_url=False, include_context=False, include_input=False)
    shown = [
        {"type": e["type"], "loc": ("body", *e["loc"]), "msg": e["msg"][:_SHOWN_CHARS]} for e in details
    ][:_SHOWN]
    plural = "s" if len(details) > 1 else ""
    lines = "".join(f"\n  {str(detail)[: 2 * _SHOWN_CHARS]}" for detail in shown)
    return f"{len(details)} validation error{plural}:{lines}"


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class SamplingParams(_Body):
    """`sampling_params` of /generate, with SGLang's defaults."""

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    n: int = 1
    stop_token_ids: _Listed[int] | None = None
    ignore_eos: bool = False
    """True: stop_token_ids are ignored too, as in SGLang."""
    skip_special_tokens: bool = True
    stream_interval: int | None = None
    """Tokens between two events of a stream, which begins with the first token; unset, 1."""
    sampling_seed: int | None = None
    """Copy k of n draws from its own stream derived from this seed."""

    def check(self) -> None:
        """Raises RequestError naming the first value out of range."""
        rules = (
            (self.max_new_tokens >= 1, "max_new_tokens must be at least 1", self.max_new_tokens),
            (0 <= self.min_new_tokens <= self.max_new_tokens, "min_new_tokens must be in [0, max_new_tokens]",
             self.min_new_tokens),
            (math.isfinite(self.temperature) and self.temperature >= 0,
             "temperature must be a non-negative finite number", self.temperature),
            (0 < self.top_p <= 1, "top_p must be in (0, 1]", self.top_p),
            (self.top_k == -1 or self.top_k >= 1, "top_k must be -1 (off) or at least 1", self.top_k),
            (0 <= self.min_p <= 1, "min_p must be in [0, 1]", self.min_p),
            (self.stream_interval is None or self.stream_interval >= 1, "stream_interval must be at least 1",
             self.stream_interval or 0),
            (1 <= self.n <= MAX_SEQUENCES, f"n must be in [1, {MAX_SEQUENCES}]", self.n),
        )  # fmt: skip
        for holds, rule, value in rules:
            if not holds:
                raise RequestError(f"{rule}, got {_number(value)}.")


def _number(value: float) -> str:
    """The number in its shortest form; an integer of thousands of digits only by its size."""
    try:
        return f"{value:g}"
    except OverflowError:
        return f"an integer of {value.bit_length()} bits" if isinstance(value, int) else str(value)


def parse_sampling(fields: Mapping[str, Any]) -> SamplingParams:
    """Raises RequestError."""
    acting = supported(fields, NEUTRAL_SAMPLING, "sampling_params.")
    check_names(acting, SamplingParams, "sampling_params.")
    try:
        params = SamplingParams.model_validate(acting)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        name = ".".join(map(str, first["loc"]))
        given = first["input"]
        got = f"{given!r:.100}" if isinstance(given, str | int | float | None) else type(given).__name__
        raise RequestError(f"sampling_params.{name}: {first['msg']}, got {got}.") from error
    params.check()
    return params


class GenerateBody(_Body):
    """POST /generate: one prompt, or a batch when `input_ids` (or `text`) is a list of prompts."""

    input_ids: _Listed[int] | _Listed[_Listed[int]] | None = None
    text: str | _Listed[str] | None = None
    rid: _Name | _Listed[_Name] | None = None
    sampling_params: dict[str, Any] | _Listed[dict[str, Any]] = Field(default_factory=dict)
    return_logprob: bool | _Listed[bool] = False
    logprob_start_len: int | _Listed[int] = -1
    top_logprobs_num: int | _Listed[int] = 0
    token_ids_logprob: _Listed[int] | _Listed[_Listed[int]] | None = None
    return_routed_experts: bool = False
    stream: bool = False
    """Answer with server-sent events while it is sampled."""
    routing_key: _Name | None = None
    """The session whose turns these are: what was computed for one is not computed again for the next."""

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        if (self.input_ids is None) == (self.text is None):
            raise ValueError("exactly one of input_ids and text is needed")
        return self


class PauseBody(_Body):
    """POST /pause_generation"""

    mode: Literal["abort", "retract", "in_place"] = "abort"


class ContinueBody(_Body):
    """POST /continue_generation"""

    torch_empty_cache: bool = True


class AbortBody(_Body):
    """POST /abort_request"""

    rid: str = ""
    abort_all: bool = False


class EmptyBody(_Body):
    """POST /end_weight_update"""


class BeginUpdateBody(_Body):
    """POST /begin_weight_update"""

    selector: Literal["target", "all"] = "target"


class UpdateFromDiskBody(_Body):
    """POST /update_weights_from_disk; `flush_cache` is refused while requests hold cache entries."""

    model_path: str
    weight_version: _Name | None = None
    flush_cache: bool = True
    abort_all_requests: bool = False
    torch_empty_cache: bool = False
    load_format: Literal["auto", "safetensors"] | None = None
    is_async: Literal[False] = False
    keep_pause: Literal[False] = False
    recapture_cuda_graph: Literal[False] = False
    token_step: Literal[0] = 0
    manifest: None = None

    @property
    def path(self) -> Path:
        return Path(self.model_path)


class UpdateVersionBody(_Body):
    """POST /update_weight_version"""

    new_version: _Name
    abort_all_requests: bool = True


class CheckerBody(_Body):
    """POST /weights_checker"""

    action: Literal["checksum"]
    skip_tensor_list: None = None
    selector: Literal["target", "all"] = "target"
    allow_quant_error: Literal[False] = False
