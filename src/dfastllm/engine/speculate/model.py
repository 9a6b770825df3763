"""The `draft_model` drafter: a smaller autoregressive model that writes ahead, with K,V of its own.

It runs through the same runner as any model. A draft of k tokens is k forwards, packed over all sequences that want
one; the first of them also brings the drafter's K,V up to the text, so after a long prompt it comes in chunks. K,V of
draft tokens that stood are kept.

Its pages are as many as the engine's, and a sequence that lost its place in them is computed again: they never run
short, and what is drafted does not depend on who else is there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from dfastllm.core import Draft, ModelInfo, Request, SequenceState, Span
from dfastllm.decode.draft.proposal import pick
from dfastllm.decode.draft.verify import Cell
from dfastllm.engine.batch import pack
from dfastllm.engine.config import EngineConfig
from dfastllm.engine.pages import OutOfPages, Pages, PageTable
from dfastllm.engine.runners import Runnable, runner_for
from dfastllm.engine.speculate.shortlist import Shortlisted
from dfastllm.errors import UnsupportedError

if TYPE_CHECKING:
    from dfastllm.models import DeviceDecoder, PackedDecoder
    from dfastllm.text import Tokenizer

__all__ = ["DraftModel", "Mirror", "Mirrors", "check_vocabulary", "ends"]

T = TypeVar("T")


class DraftModel:
    """Drafts with an autoregressive `model`. config: the engine's. Raises UnsupportedError for another kind."""

    def __init__(
        self,
        model: Runnable | PackedDecoder | DeviceDecoder,
        config: EngineConfig,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if model.info.kind != "ar":
            raise UnsupportedError(
                f"method draft_model needs an autoregressive model; {model.info.name} is of kind {model.info.kind!r}.",
                param="speculative_config",
                hint="Use method diffusion for it.",
            )
        self.info = model.info
        self.shortlist: Tensor | None = getattr(model, "shortlist", None)
        self.mirrors = Mirrors(config)
        min_rows = config.min_rows or max(16, 8 * torch.get_num_threads())
        slots = self.mirrors.pages.count * config.page_size
        self.runner = runner_for(model, slots, dtype or model.dtype, device, min_rows, config.page_size)
        self.chunk = min(config.prefill_chunk, config.max_batch_rows)
        self.most_rows = config.max_batch_rows

    def check(self, request: Request, model: ModelInfo) -> None:
        return None

    def passes(self, most: int) -> int:
        return most

    @torch.inference_mode()
    def propose(self, wanted: Sequence[tuple[SequenceState, int]]) -> list[Draft]:
        drafts = [Draft((), len(seq.tokens)) for seq, _ in wanted]
        tasks = []
        for number, (seq, most) in enumerate(wanted):
            most = min(most, self.info.max_len - len(seq.tokens) + 1)
            if most > 0:
                tasks.append(_Task(number, seq, self.mirrors.of(seq), most))
        for group in self.mirrors.fitting(tasks, lambda t: (t.mirror, len(t.seq.tokens) + t.most - 1)):
            self._write(group)
            for task in group:
                drafts[task.number] = task.draft()
        return drafts

    def _write(self, tasks: list[_Task]) -> None:
        """Run the model until every task has its tokens. What exceeds a forward's rows waits for the next one."""
        while tasks:
            batch: list[tuple[_Task, Span]] = []
            left = self.most_rows
            for task in tasks:
                span = task.span(self.chunk)
                if batch and span.rows > left:
                    break
                left -= span.rows
                batch.append((task, span))
            rows = self.runner.run(
                pack([(span, t.mirror.table, t.mirror.kv_len) for t, span in batch], self.runner.block_size)
            )
            if self.shortlist is not None:
                rows = Shortlisted(rows, self.shortlist, self.info.vocab_size)
            for task, span in batch:
                task.mirror.kv_len = span.stop
            deciding = [task for task, span in batch if span.want]
            ban = () if self.info.mask_id is None else (self.info.mask_id,)
            for task, proposal in zip(deciding, pick([t.cell() for t in deciding], rows, ban), strict=True):
                task.tokens.append(proposal.token)
                if proposal.probs is not None:
                    task.probs.append(proposal.probs)
            tasks = [t for t in (*tasks[len(batch) :], *(t for t, _ in batch)) if not t.done]

    def release(self, seq: SequenceState) -> None:
        self.mirrors.release(seq)


@dataclass(slots=True)
class Mirror:
    """A sequence's K,V in a drafter: positions [0, kv_len), the last of them perhaps of draft tokens, `ahead`."""

    table: PageTable
    kv_len: int = 0
    ahead: tuple[int, ...] = ()

    def settle(self, tokens: Sequence[int]) -> None:
        """Keep K,V of what came true."""
        start = self.kv_len - len(self.ahead)
        pairs = enumerate(zip(self.ahead, tokens[start:], strict=False))
        stood = next((i for i, (ours, theirs) in pairs if ours != theirs), min(len(self.ahead), len(tokens) - start))
        self.kv_len, self.ahead = start + stood, ()


class Mirrors:
    """The sequences a drafter has K,V of, least recently used first, in as many pages as the engine has and those of
    `extra` positions."""

    def __init__(self, config: EngineConfig, extra: int = 0) -> None:
        size = config.page_size
        self.pages = Pages(math.ceil(config.kv_tokens / size) + math.ceil(extra / size), size)
        self.evicted = 0
        self._held: dict[str, Mirror] = {}

    def of(self, seq: SequenceState) -> Mirror:
        """Its mirror, brought up to its text; from now on the most recently used."""
        mirror = self._held.pop(seq.request.request_id, None) or Mirror(PageTable(self.pages))
        self._held[seq.request.request_id] = mirror
        mirror.settle(seq.tokens)
        return mirror

    def fitting(self, tasks: Sequence[T], needs: Callable[[T], tuple[Mirror, int]]) -> Iterator[list[T]]:
        """The tasks in groups that fit into the pages together, these allocated. needs: a task's mirror and how many
        positions it will have. Mirrors outside the group give way, the least recently used first."""
        todo = list(tasks)
        while todo:
            group: list[T] = []
            busy: set[int] = set()
            for task in todo:
                mirror, positions = needs(task)
                busy.add(id(mirror))
                if not self._grow(mirror, positions, busy):
                    break
                group.append(task)
            assert group, "a sequence of the engine fits into as many pages as the engine has"
            yield group
            del todo[: len(group)]

    def _grow(self, mirror: Mirror, positions: int, busy: set[int]) -> bool:
        while True:
            try:
                mirror.table.grow(positions)
                return True
            except OutOfPages:
                victim = next((m for m in self._held.values() if m.table.pages and id(m) not in busy), None)
                if victim is None:
                    return False
                victim.table.free()
                victim.kv_len, victim.ahead = 0, ()
                self.evicted += 1

    def release(self, seq: SequenceState) -> None:
        mirror = self._held.pop(seq.request.request_id, None)
        if mirror is not None:
            mirror.table.free()


@dataclass(slots=True)
class _Task:
    """A draft being written. number: its place in the answer."""

    number: int
    seq: SequenceState
    mirror: Mirror
    most: int
    tokens: list[int] = field(default_factory=list)
    probs: list[Tensor] = field(default_factory=list)

    def span(self, chunk: int) -> Span:
        """The next positions without K,V, logits wanted where the last token is among them."""
        known, at = len(self.seq.tokens), min(self.mirror.kv_len, len(self.seq.tokens) + len(self.tokens) - 1)
        stop = min(known + len(self.tokens), at + chunk)
        ids = (*self.seq.tokens[at : min(stop, known)], *self.tokens[max(0, at - known) : max(0, stop - known)])
        want = (len(ids) - 1,) if stop == known + len(self.tokens) else ()
        return Span(at, ids, "causal", "keep", want=want)

    def cell(self) -> Cell:
        return Cell(self.seq, Draft(tuple(self.tokens), len(self.seq.tokens)), len(self.tokens))

    @property
    def done(self) -> bool:
        return len(self.tokens) == self.most or (bool(self.tokens) and ends(self.seq, self.tokens[-1]))

    def draft(self) -> Draft:
        self.mirror.ahead = tuple(self.tokens[: self.mirror.kv_len - len(self.seq.tokens)])
        probs = torch.stack(self.probs) if self.probs else None
        return Draft(tuple(self.tokens), len(self.seq.tokens), probs)


def ends(seq: SequenceState, token: int) -> bool:
    """Whether the text ends with this token (before min_tokens none is drawn)."""
    return token in seq.ends.ids


def check_vocabulary(
    target: ModelInfo, tokenizer: Tokenizer | None, draft: ModelInfo, draft_tokenizer: Tokenizer | None
) -> None:
    """Raises UnsupportedError unless both models mean the same tokens by the same ids, whatever widths their logits are
    padded to. The mask tokens of a drafting diffusion model need not be known to the other. Without tokenizers (models
    of test benches) the widths must be equal."""
    if tokenizer is None or draft_tokenizer is None:
        if target.vocab_size != draft.vocab_size:
            _differ(target, draft, f"{draft.vocab_size} ids against {target.vocab_size}")
        return
    masks = {i for i in (target.mask_id, draft.mask_id) if i is not None}
    wrong = tokenizer.differing_ids(draft_tokenizer, masks)
    if wrong:
        first = wrong[0]
        _differ(
            target,
            draft,
            f"{len(wrong)} ids mean other tokens, the first is {first}: {draft_tokenizer.id_to_token(first)!r} against"
            f" {tokenizer.id_to_token(first)!r}",
        )
    eos = set(target.eos_ids) ^ set(draft.eos_ids)
    if target.eos_ids and draft.eos_ids and not set(target.eos_ids) & set(draft.eos_ids):
        _differ(target, draft, f"no common end token ({sorted(eos)})")


def _differ(target: ModelInfo, draft: ModelInfo, how: str) -> None:
    raise UnsupportedError(
        f"{draft.name} cannot draft for {target.name}: their tokenizers differ ({how}).",
        param="speculative_config",
        hint="Choose a draft model of the same tokenizer.",
    )
