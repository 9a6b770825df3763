"""The `diffusion` drafter: a masked model drafts a block for an autoregressive target in one forward.

The text, then mask tokens; the rows of the masks propose what follows, all at once. How far ahead the draft reaches
costs next to nothing, but its tokens do not know each other, so they agree with the target less the further they are.
A bigram head (`bigram`) chooses them from left to right, so that they agree with each other.

A block-causal model keeps exact K,V of the blocks the text has filled. A full-attention model has none to keep: each
draft runs over the text, its last `window` tokens at most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dfastllm.core import Draft, ModelInfo, Request, SequenceState, Span
from dfastllm.decode.draft.proposal import Proposal, pick
from dfastllm.decode.draft.verify import Cell
from dfastllm.engine.batch import pack
from dfastllm.engine.config import EngineConfig
from dfastllm.engine.pages import Pages, PageTable
from dfastllm.engine.runners import Runnable, runner_for
from dfastllm.engine.speculate.bigram import Wanted, chained
from dfastllm.engine.speculate.model import Mirror, Mirrors, ends
from dfastllm.errors import UnsupportedError, ValidationError
from dfastllm.kernels.rows import Rows
from dfastllm.models.bigram import Bigram

if TYPE_CHECKING:
    from dfastllm.models import DeviceDecoder, PackedDecoder

__all__ = ["DraftCanvas"]

WINDOW = 1024
CANVAS = 16


class DraftCanvas:
    """Drafts with a masked `model`, kind "diffusion" or "block". config: the engine's.

    window  tokens of the text that a full-attention model sees at most.
    canvas  mask tokens it gets at least, if more than are drafted: with fewer its guesses are a little worse.
            A block-causal model gets the rest of its block, and further blocks as far as the draft reaches.
    bigram  chooses the tokens from left to right; None: each row says its own.

    Raises UnsupportedError for an autoregressive model or one without a mask token, ValidationError for a bigram head
    of another vocabulary.
    """

    def __init__(
        self,
        model: Runnable | PackedDecoder | DeviceDecoder,
        config: EngineConfig,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        window: int = WINDOW,
        canvas: int = CANVAS,
        bigram: Bigram | None = None,
    ) -> None:
        info = model.info
        if info.kind == "ar" or info.mask_id is None:
            raise UnsupportedError(
                f"method diffusion needs a masked model; {info.name} is of kind {info.kind!r}.",
                param="speculative_config",
                hint="Use method draft_model for an autoregressive one.",
            )
        if bigram is not None and bigram.vocabulary != info.vocab_size:
            raise ValidationError(
                f"a bigram head of {bigram.vocabulary} tokens; {info.name} has {info.vocab_size}.", param="bigram"
            )
        self.info = info
        self.bigram = bigram
        self.mask = info.mask_id
        self.window, self.canvas = window, canvas
        self.mirrors = Mirrors(config, extra=info.block) if info.kind == "block" else None
        self.pages = self.mirrors.pages if self.mirrors else Pages(1, config.page_size)
        min_rows = config.min_rows or max(16, 8 * torch.get_num_threads())
        slots = self.pages.count * config.page_size
        self.runner = runner_for(model, slots, dtype or model.dtype, device, min_rows, config.page_size)
        self.most_rows = config.max_batch_rows
        self.chunk = max(
            info.block, min(config.prefill_chunk, config.max_batch_rows) // max(1, info.block) * info.block
        )

    def check(self, request: Request, model: ModelInfo) -> None:
        return None

    def passes(self, most: int) -> int:
        return 1

    @torch.inference_mode()
    def propose(self, wanted: Sequence[Wanted]) -> list[Draft]:
        drafts = [Draft((), len(seq.tokens)) for seq, _ in wanted]
        for numbers, some, rows in self.rows(wanted):
            for number, (seq, _), found in zip(numbers, some, self._chosen(some, rows), strict=True):
                drafts[number] = _draft(seq, found)
        return drafts

    @torch.inference_mode()
    def rows(self, wanted: Sequence[Wanted]) -> Iterator[tuple[list[int], list[Wanted], Rows]]:
        """What the model says where drafts are wanted, forward by forward: numbers of the drafts, the drafts
        themselves (shorter where the context ends), and their rows, one for each token. A draft that does not fit has
        none."""
        if self.mirrors is None:
            none = Mirror(PageTable(self.pages))
            most = self.info.max_len - 1
            yield from self._forwards([_Task(n, s, min(m, most), none) for n, (s, m) in enumerate(wanted)])
            return
        tasks = [_Task(n, seq, most, self.mirrors.of(seq)) for n, (seq, most) in enumerate(wanted)]
        tasks = [t for t in tasks if self._stop(t) <= self.info.max_len]
        for group in self.mirrors.fitting(tasks, lambda t: (t.mirror, self._stop(t))):
            yield from self._forwards(group)

    def _chosen(self, wanted: Sequence[Wanted], rows: Rows) -> list[list[Proposal]]:
        """For each draft what its rows propose."""
        if self.bigram is not None:
            return chained(self.bigram, wanted, rows, (self.mask,))
        found = iter(pick([Cell(seq, None, j) for seq, most in wanted for j in range(most)], rows, (self.mask,)))
        return [[next(found) for _ in range(most)] for _, most in wanted]

    def _stop(self, task: _Task) -> int:
        """End of the last block that a draft of a block-causal model reaches into."""
        return -(-(len(task.seq.tokens) + task.most) // self.info.block) * self.info.block

    def _forwards(self, tasks: list[_Task]) -> Iterator[tuple[list[int], list[Wanted], Rows]]:
        while tasks:
            batch: list[tuple[_Task, Span]] = []
            left = self.most_rows
            for task in tasks:
                span = self._span(task)
                if batch and span.rows > left:
                    break
                left -= span.rows
                batch.append((task, span))
            rows = self.runner.run(
                pack([(span, t.mirror.table, t.mirror.kv_len) for t, span in batch], self.runner.block_size)
            )
            for task, span in batch:  # what the text has not filled is not kept
                if self.mirrors is not None:
                    task.mirror.kv_len = min(span.stop, len(task.seq.tokens) // self.info.block * self.info.block)
            deciding = [task for task, span in batch if span.want]
            if deciding:
                yield [task.number for task in deciding], [(task.seq, task.most) for task in deciding], rows
            tasks = [*tasks[len(batch) :], *(task for task, span in batch if not span.want)]

    def _span(self, task: _Task) -> Span:
        tokens, most = task.seq.tokens, task.most
        if self.mirrors is None:
            masks = max(most, min(self.canvas, self.info.max_len // 2))
            text = tokens[-min(self.window, self.info.max_len - masks) :]
            first = len(text) - self.info.shift
            ids = (*text, *([self.mask] * masks))
            return Span(0, ids, "full", "none", want=tuple(range(first, first + most)))
        known, block = len(tokens), self.info.block
        # with a shift the row before the draft must be in the span, and it may be the last one of a finished block
        start = min(task.mirror.kv_len, (known - self.info.shift) // block * block)
        stop = self._stop(task)
        if stop - start > self.chunk and start + self.chunk <= known // block * block:
            return Span(start, tuple(tokens[start : start + self.chunk]), "block", "keep", block=block)
        first = known - self.info.shift - start
        ids = (*tokens[start:], *([self.mask] * (stop - known)))
        return Span(start, ids, "block", "keep", want=tuple(range(first, first + most)), block=block)

    def release(self, seq: SequenceState) -> None:
        if self.mirrors is not None:
            self.mirrors.release(seq)


@dataclass(slots=True)
class _Task:
    """A draft to make. number: its place in the answer."""

    number: int
    seq: SequenceState
    most: int
    mirror: Mirror


def _draft(seq: SequenceState, found: Sequence[Proposal]) -> Draft:
    """What the rows propose, up to the first token that ends the text."""
    end = next((j + 1 for j, p in enumerate(found) if ends(seq, p.token)), len(found))
    probs = [p.probs for p in found[:end] if p.probs is not None]
    return Draft(tuple([p.token for p in found[:end]]), len(seq.tokens), torch.stack(probs) if probs else None)
