"""Continuous batching over a `transformers` decoder: a synchronous state machine, driven by `worker.py`.

Every running sequence owns one row of the cache; the rows are always [0, R). Prompts are prefilled without
their last token, which the next decode step feeds, so that sampling happens in one place. Equal prompts
admitted together (the n samples of a group) are prefilled once; what goes on from a response of its session
is prefilled from there. A retracted sequence is just a longer prompt.

The seeded draw depends on (seed, output position) alone. The logits of a row depend on its neighbours only by
the rounding of the matrix products (about 1e-6).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mcore_rl.errors import NumericsError
from mcore_rl.server.decode import build_decoder
from mcore_rl.server.kv_cache import SlotCache
from mcore_rl.server.prefixes import PrefixCache
from mcore_rl.server.routing import routed_experts
from mcore_rl.server.sampling import sample
from mcore_rl.server.sequence import Details, RunningSequences, Sequence, build_rows
from mcore_rl.server.windows import Masks

PauseMode = Literal["abort", "retract", "in_place"]

_ABORTED = {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
_PREFILL_TOKENS = 1 << 12
"""Padded tokens of one prefill forward, and tokens of different prompts that a step admits, unless it is one
prompt: commands wait for a step, which takes seconds on a CPU."""
_PREFILL_LOGITS = 1 << 26
"""Logits of one prefill forward that returns prompt log-probs."""


class Engine:
    """Not thread-safe: one thread calls everything."""

    def __init__(self, model: PreTrainedModel, cache: SlotCache, *, max_running: int) -> None:
        self.model = model
        self.decoder = build_decoder(model)
        """None: the model's own forward decodes"""
        self.masks = Masks(model)
        self.cache = cache
        self.max_running = max_running
        self.vocab_size: int = model.config.get_text_config().vocab_size
        self.version = "default"
        self.paused = False
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.rows = build_rows([], model.device)
        self.prefixes = PrefixCache(cache.capacity)
        """of sessions, beside the cache"""
        self.epoch = 0
        """how often the weights, or their version, have changed"""
        self.prefilled = 0
        """tokens that went through prefill since the start"""
        self.moved = time.monotonic()
        """when a step, or a layer of a forward within it, was last begun or done"""
        for layers in model.modules():
            for layer in layers if isinstance(layers, nn.ModuleList) else ():
                layer.register_forward_hook(self._move)

    def _move(self, *_: object) -> None:
        self.moved = time.monotonic()

    @property
    def used_tokens(self) -> int:
        """Tokens in the cache."""
        return int(self.rows.position.sum()) if self.running else 0

    def submit(self, sequences: list[Sequence]) -> None:
        """Queues sequences whose `reserved` length fits the cache (the API checks it)."""
        self.waiting.extend(sequences)

    @torch.inference_mode()
    def step(self, *, admit: bool = True) -> list[Sequence]:
        """Admits what fits, decodes one token for every running row, returns the sequences that finished.

        Raises NumericsError when the model's logits are not finite; the running sequences are then lost.
        """
        if admit:
            self._admit()
        return self._decode() if self.running else []

    def sampled(self) -> list[tuple[Sequence, tuple[list[int], list[float]]]]:
        """The ids and log-probs until now, of running sequences that are streamed and due."""
        streamed = [i for i, sequence in enumerate(self.running) if sequence.wanted.stream_every]
        if not streamed:
            return []
        counts = self.rows.generated.tolist()
        due = [i for i in streamed if (counts[i] - 1) % self.running[i].wanted.stream_every == 0]
        ids, scores = self.rows.output_ids, self.rows.log_probs
        return [
            (self.running[i], (ids[i, : counts[i]].tolist(), scores[i, : counts[i]].tolist()))
            for i in due
            if counts[i]
        ]

    # -- control ------------------------------------------------------------------------------------------

    def pause(self, mode: PauseMode) -> list[Sequence]:
        """Stops decoding: `abort` ends all, `retract` drops the cache and queues again, `in_place` freezes.

        Returns the aborted sequences.
        """
        self.paused = True
        if mode == "abort":
            return self.abort(lambda _: True)
        if mode == "retract":
            retracted = self._leave(list(range(len(self.running))))
            for sequence in retracted:
                sequence.num_retractions += 1
            self.waiting.extendleft(reversed(retracted))
        return []

    def resume(self) -> None:
        """Goes on after a pause."""
        self.paused = False

    def abort(self, match: Callable[[Sequence], bool]) -> list[Sequence]:
        """Ends the matching sequences; what they have sampled so far stays in them."""
        aborted = self._leave([i for i, sequence in enumerate(self.running) if match(sequence)])
        aborted += [sequence for sequence in self.waiting if match(sequence)]
        self.waiting = deque(sequence for sequence in self.waiting if not match(sequence))
        for sequence in aborted:
            self._finish(sequence, dict(_ABORTED))
        return aborted

    def clear(self) -> None:
        """Forgets every sequence without finishing it (after an error)."""
        self.running, self.rows = [], build_rows([], self.model.device)
        self.waiting.clear()

    def forget_prefixes(self) -> None:
        """Nothing that was computed until now is used for another sequence."""
        self.prefixes.clear()
        self.epoch += 1
        for sequence in self.waiting:
            sequence.prefix, sequence.restored = None, 0

    def set_version(self, version: str) -> None:
        """Later tokens are sampled from weight version `version`."""
        self.version = version
        self.forget_prefixes()
        for sequence, position in zip(self.running, self.rows.generated.tolist(), strict=True):
            sequence.mark(version, position)

    # -- admission ----------------------------------------------------------------------------------------

    def _select(self) -> list[list[Sequence]]:
        """The waiting sequences, first come first served, that fit beside the running ones at full length.

        In groups of equal tokens; of different ones, as many as a step may prefill.
        """
        longest = max((s.reserved for s in self.running), default=0)
        groups: dict[tuple[int, ...], list[Sequence]] = {}
        rows, prefilled = len(self.running), 0
        while self.waiting:
            longest = max(longest, self.waiting[0].reserved)
            if rows + 1 > min(self.max_running, self.cache.rows_for(longest)):
                break
            tokens = tuple(self.waiting[0].tokens)
            if tokens not in groups:
                self._find_prefix(self.waiting[0])
                prefilled += len(tokens) - self.waiting[0].restored
                if groups and prefilled > _PREFILL_TOKENS:
                    break
            groups.setdefault(tokens, []).append(self.waiting.popleft())
            rows += 1
        return list(groups.values())

    def _find_prefix(self, sequence: Sequence) -> None:
        """What its session has of its tokens; none where log-probs of the prompt are wanted."""
        sequence.prefix, sequence.restored = None, 0
        if sequence.session and not _prefill_order([sequence])[0]:
            found = self.prefixes.find(sequence.session, sequence.tokens[:-1])
            sequence.prefix, sequence.restored = found
            sequence.num_cached = min(sequence.restored, len(sequence.prompt) - 1)

    def _admit(self) -> None:
        groups = sorted(self._select(), key=_prefill_order)
        if not groups:
            return
        new = [sequence for group in groups for sequence in group]
        # New rows: the first of every group, which is prefilled, then the others, which are copied.
        others = [other for group in groups for other in group[1:]]
        order = [group[0] for group in groups] + others
        first, live = len(self.running), len(self.running)
        self.cache.reserve(live + len(new), max(s.reserved for s in [*self.running, *new]), live)
        for chunk in self._chunks(groups):
            self._prefill(first, chunk)
            first += len(chunk)
        if others:
            source = [live + i for i, group in enumerate(groups) for _ in group[1:]]
            self._copy(source, list(range(first, first + len(others))), max(len(s.tokens) for s in others))
        for sequence in others:
            sequence.num_cached = len(sequence.prompt) - 1
        for sequence in order:
            sequence.mark(self.version, len(sequence.output_ids))
            sequence.epoch = self.epoch
        self.running += order
        self.rows = self.rows.join(build_rows(order, self.model.device))

    def _chunks(self, groups: list[list[Sequence]]) -> Iterator[list[list[Sequence]]]:
        """Splits groups in `_prefill_order` into bounded forwards.

        All or none of one want log-probs, and all or none go on from a prefix.
        """
        chunk: list[list[Sequence]] = []
        for group in groups:
            *kind, width = _prefill_order(group)
            limit = _PREFILL_LOGITS // self.vocab_size if kind[0] else _PREFILL_TOKENS
            if chunk and ([*_prefill_order(chunk[0])][:2] != kind or (len(chunk) + 1) * width > limit):
                yield chunk
                chunk = []
            chunk.append(group)
        if chunk:
            yield chunk

    def _prefill(self, first_row: int, chunk: list[list[Sequence]]) -> None:
        """Fills the cache rows from `first_row` on, one per group, with all tokens but the last.

        What a session had of them is copied; the forward holds the others.
        """
        wants, goes_on, longest = _prefill_order(chunk[-1])
        heads, rows = [group[0] for group in chunk], slice(first_row, first_row + len(chunk))
        for row, head in enumerate(heads, first_row):
            if head.prefix is not None:
                self.cache.fill(row, head.prefix.layers, head.restored)
                head.prefix = None
        width = longest - 1
        if width == 0:
            return
        new = [head.tokens[head.restored : -1] for head in heads]
        self.prefilled += sum(map(len, new))
        device = self.model.device
        ids = torch.tensor([[*tokens, *[0] * (width - len(tokens))] for tokens in new], device=device)
        starts = torch.tensor([head.restored for head in heads], device=device)
        positions = starts[:, None] + torch.arange(width, device=device)
        if goes_on:
            # Padding may reach beyond the row: it is written where no token is yet.
            positions = positions.clamp(max=self.cache.length - 1)
            seen = int(positions.max()) + 1
            self.cache.at_extend(rows, positions, seen)
            visible = (torch.arange(seen, device=device) <= positions[:, :, None])[:, None]
            places = positions[:, None]
        else:
            # Padding lies behind every real token, so that the causal mask alone hides it.
            self.cache.at_prefill(rows, width)
            visible = torch.ones(1, 1, width, width, dtype=torch.bool, device=device).tril()
            places = positions[:1, None]
        logits = self.model(
            input_ids=ids,
            attention_mask=self.masks.of(visible, places),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=0 if wants else 1,
        ).logits
        if wants:
            for row, group in zip(logits, chunk, strict=True):
                _score_prompt(row.float(), group)

    # -- decode -------------------------------------------------------------------------------------------

    def _decode(self) -> list[Sequence]:
        rows = self.rows
        logits = self._logits(rows)
        for i in (rows.generated < rows.min_new).nonzero()[:, 0].tolist():
            stop_ids = rows.stop_ids[i]
            logits[i, stop_ids[stop_ids >= 0]] = -torch.inf
        tokens, log_probs, scores = sample(logits, rows.knobs())
        if not bool(log_probs.isfinite().all()):
            raise NumericsError(
                f"weight version {self.version}: the logits are not finite; publish sound weights and retry"
            )
        for i, sequence in enumerate(self.running):
            if sequence.wanted.extras:
                _append_details(sequence.output_details, sequence, scores.row(i))
        stopped = rows.append(tokens, log_probs)
        # As in SGLang the length limit is looked at first: a stop token in the last place counts as "length".
        full = rows.generated >= rows.max_new
        leaving = (stopped | full).nonzero()[:, 0].tolist()
        by_length = full[leaving].tolist()
        finished = self._leave(leaving, keep=True)
        for sequence, at_limit in zip(finished, by_length, strict=True):
            reason = (
                {"type": "length", "length": sequence.limits.max_new_tokens}
                if at_limit
                else {"type": "stop", "matched": sequence.output_ids[-1]}
            )
            self._finish(sequence, reason)
        return finished

    def _logits(self, rows: RunningSequences) -> Tensor:
        """[R, V] float32 logits of the token after `rows.token`."""
        width = int(rows.position.max()) + 1
        self.cache.at_decode(rows.position, width)
        seen = torch.arange(width, device=rows.position.device) <= rows.position[:, None]
        if self.decoder is not None:
            return self.decoder(rows.token, rows.position, seen, self.cache).float()
        output = self.model(
            input_ids=rows.token[:, None],
            attention_mask=self.masks.of(seen[:, None, None, :], rows.position[:, None, None]),
            position_ids=rows.position[:, None],
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.logits[:, -1].float()

    # -- leaving ------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _leave(self, leaving: list[int], *, keep: bool = False) -> list[Sequence]:
        """Takes rows (ascending) out of the batch, with their output; the rest stays compact.

        With `keep`, their sessions may go on from what was computed for them.
        """
        if not leaving:
            return []
        gone = self.rows.take(torch.tensor(leaving, device=self.rows.token.device))
        left = [self.running[i] for i in leaving]
        columns = (gone.generated.tolist(), gone.output_ids.tolist(), gone.log_probs.tolist())
        for sequence, length, output_ids, log_probs in zip(left, *columns, strict=True):
            sequence.output_ids, sequence.log_probs = output_ids[:length], log_probs[:length]
        if keep:
            for row, sequence in zip(leaving, left, strict=True):
                self._keep_prefix(row, sequence)
        kept, absent = len(self.running) - len(leaving), set(leaving)
        holes = [i for i in leaving if i < kept]
        movers = [i for i in range(kept, len(self.running)) if i not in absent]
        if holes:
            self._copy(movers, holes, int(self.rows.position.max()))
        order = list(range(kept))
        for hole, mover in zip(holes, movers, strict=True):
            order[hole] = mover
        self.running = [self.running[i] for i in order]
        self.rows = self.rows.take(torch.tensor(order, dtype=torch.long, device=self.rows.token.device))
        return left

    def _keep_prefix(self, row: int, sequence: Sequence) -> None:
        """For the next turn of its session. The last token was sampled and never fed."""
        known = len(sequence.tokens) - 1
        if sequence.session and sequence.epoch == self.epoch and known <= self.prefixes.capacity:
            self.prefixes.keep(sequence.session, sequence.tokens[:-1], self.cache.row(row, known))

    def _copy(self, source: list[int], target: list[int], width: int) -> None:
        device = self.model.device
        self.cache.copy_rows(torch.tensor(source, device=device), torch.tensor(target, device=device), width)

    def _finish(self, sequence: Sequence, reason: dict[str, object]) -> None:
        sequence.finish_reason = reason
        sequence.final_version = self.version
        if sequence.wanted.experts and sequence.output_ids:
            sequence.experts = routed_experts(self.model, sequence.tokens)


def _prefill_order(group: list[Sequence]) -> tuple[bool, bool, int]:
    """(Whether prompt log-probs are wanted, whether it goes on from a prefix, tokens that are new).

    Groups of one forward are alike in the first two, and of about one length.
    """
    wants = any(s.wanted.prompt_from >= 0 and not s.prompt_log_probs for s in group)
    restored = group[0].restored
    return wants, restored > 0, len(group[0].tokens) - restored


def _score_prompt(logits: Tensor, group: list[Sequence]) -> None:
    """Untempered prompt log-probs from logits [width, V] of the group's shared tokens.

    The prompts may differ in length: a retracted sequence has part of its tokens from its own output.
    """
    targets = torch.tensor(group[0].tokens[1:], device=logits.device)
    log_probs = logits[: len(targets)].log_softmax(-1)
    chosen = log_probs.gather(1, targets[:, None])[:, 0].tolist()
    for sequence in group:
        scored = len(sequence.prompt) - 1
        if sequence.wanted.prompt_from >= 0:
            sequence.prompt_log_probs = chosen[:scored]
            if sequence.wanted.extras:
                sequence.prompt_details = Details()
                for row in log_probs[:scored]:
                    _append_details(sequence.prompt_details, sequence, row)


def _append_details(details: Details, sequence: Sequence, log_probs: Tensor) -> None:
    """Adds the wanted extras of one scored token; log_probs [V]."""
    wanted = sequence.wanted
    if wanted.top:
        values, ids = log_probs.topk(wanted.top)
        details.top.append(list(zip(values.tolist(), ids.tolist(), strict=True)))
    if wanted.token_ids:
        details.token_ids.append([(float(log_probs[i]), i) for i in wanted.token_ids])
