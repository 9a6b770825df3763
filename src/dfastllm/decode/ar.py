"""Autoregressive decoding: prefill in chunks, then one token a step, or as many as a draft gets right.

A draft lengthens the span that decides: the text's last token and the draft's, all causal, each row judged (`verify`);
K,V of what does not stand are cut off by the commit. Without one the span is the plain step, so speculation is a value
of this policy and not another. Rebuilding after a preemption is the same prefill over all tokens so far, so nothing but
the tokens is state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dfastllm.core import (
    Commit,
    DecodeParams,
    Draft,
    FinishReason,
    ModelInfo,
    Request,
    SequenceState,
    Span,
    TokenLogprob,
)
from dfastllm.decode.draft.history import History, after
from dfastllm.decode.draft.verify import Cell, cells_of, choose, rejects, standing
from dfastllm.decode.sampling import check_sampling
from dfastllm.errors import ContextLengthError, UnsupportedError, ValidationError
from dfastllm.kernels.rows import Rows

__all__ = ["Autoregressive", "check_prompt", "deciding", "draft_room", "enders", "settled", "tokens_left"]


class Autoregressive:
    """The `ar` policy. Greedy or sampled; ends at EOS, a stop token, max_tokens or the model's context."""

    name = "ar"

    def check(self, request: Request, model: ModelInfo) -> None:
        """Raises ValidationError, ContextLengthError or UnsupportedError naming the field."""
        if model.kind != "ar":
            raise UnsupportedError(
                f"the ar decoder needs a causal model, but {model.name} is of kind {model.kind!r}.", param="model"
            )
        plain = DecodeParams(rule=None if model.causal and request.decode == DecodeParams() else "ar")
        if request.decode is not None and request.decode != plain:
            raise UnsupportedError(
                f"model {model.name} is autoregressive and has no diffusion options."
                if request.decode.rule != "ar"
                else "rule 'ar' has no diffusion options.",
                param="decode",
                hint="Leave out threshold, factor, steps, block_length, remasking, cache, or choose a diffusion model.",
            )
        if request.suffix:
            raise UnsupportedError(
                f"model {model.name} is autoregressive and cannot fill in before a suffix.",
                param="suffix",
                hint="Choose a diffusion model.",
            )
        check_prompt(request, model)
        if len(request.prompt) >= model.max_len:
            raise ContextLengthError(
                f"the prompt has {len(request.prompt)} tokens, but the context of {model.name} is {model.max_len}.",
                param="prompt",
                hint="Shorten the prompt: at least one position must be left to generate.",
            )
        check_sampling(request.sampling, model)

    def begin(self, request: Request, model: ModelInfo) -> tuple[list[int], Any]:
        return list(request.prompt), None

    def bound(self, request: Request, model: ModelInfo) -> int:
        """Forwards after the prompt is in, at most."""
        return request.sampling.max_tokens

    def exactness(self, request: Request) -> str:
        asked = request.speculative
        if asked is None or asked.method == "none":
            return "reference"
        hot = request.sampling.temperature > 0
        return "exact-distribution" if asked.acceptance == "rejection" and hot else "exact-fast"

    def plan(self, seq: SequenceState, limit: int) -> Span:
        """The rest of the known tokens, at most `limit` of them; logits of the last one only, and of the draft's that
        follow it (they may exceed the limit)."""
        draft = seq.draft if seq.draft is not None and seq.draft.length == len(seq.tokens) else None
        return deciding(seq, limit, draft if draft and draft.tokens else None)

    def absorb(self, items: Sequence[tuple[SequenceState, Span]], rows: Rows) -> list[Commit]:
        cells: list[Cell] = []
        for seq, span in items:
            if span.want:
                cells += cells_of(seq, span.plan)
        tokens, records = choose(cells, rows)
        at, commits = 0, []
        for seq, span in items:
            if not span.want:
                commits.append(Commit(state=seq.policy, stable=len(seq.tokens)))
            elif span.plan is None:
                commits.append(settled(seq, None, tokens[at : at + 1], records[at : at + 1]))
                at += 1
            else:
                part = slice(at, at + len(span.want))
                at = part.stop
                commits.append(settled(seq, span.plan, tokens[part], records[part]))
        return commits


def deciding(seq: SequenceState, limit: int, draft: Draft | None) -> Span:
    """The rest of the known tokens, at most `limit` of them, and once they are complete those of the draft, with the
    rows that decide what follows them."""
    known = len(seq.tokens)
    start = min(seq.kv_len, known - 1)
    stop = min(known, start + max(1, limit))
    if stop < known:
        return Span(start=start, ids=tuple(seq.tokens[start:stop]), attend="causal", store="keep")
    ids = tuple(seq.tokens[start:stop]) + (draft.tokens if draft else ())
    want = tuple(range(stop - start - 1, len(ids)))
    return Span(start=start, ids=ids, attend="causal", store="keep", want=want, plan=draft)


def draft_room(seq: SequenceState, limit: int) -> int:
    """Most draft tokens the next forward could use: 0 while the known tokens do not fit into one of `limit` rows, and
    never beyond the last token that the request may still have but one (the forward gives one itself)."""
    known = len(seq.tokens)
    if known - min(seq.kv_len, known - 1) > max(1, limit):
        return 0
    return max(0, tokens_left(seq) - 1)


def tokens_left(seq: SequenceState) -> int:
    """Tokens that max_tokens and the model's context still leave."""
    return min(seq.canvas_start + seq.sampling.max_tokens, seq.model.max_len) - len(seq.tokens)


def check_prompt(request: Request, model: ModelInfo) -> None:
    """Raise ValidationError when a prompt or suffix id is outside the model's vocabulary."""
    for param, ids in (("prompt", request.prompt), ("suffix", request.suffix)):
        if ids and not (min(ids) >= 0 and max(ids) < model.vocab_size):
            raise ValidationError(
                f"{param} holds a token id outside [0, {model.vocab_size}), the vocabulary of {model.name}.",
                param=param,
                hint="Encode it with this model's own tokenizer.",
            )


def enders(sampling_stop: tuple[int, ...], ignore_eos: bool, model: ModelInfo) -> tuple[int, ...]:
    """Ids that end a text: EOS unless ignored, and the stop tokens."""
    return tuple(dict.fromkeys((() if ignore_eos else model.eos_ids) + sampling_stop))


def settled(
    seq: SequenceState, draft: Draft | None, tokens: Sequence[int], records: Sequence[TokenLogprob | None]
) -> Commit:
    """The draft tokens that stand and the one that the row after them gives; cut where the text ends."""
    n, s = len(seq.tokens), seq.sampling
    accepted = standing(tokens, draft) if draft else 0
    fixed, finish = {}, None
    for j, token in enumerate(tokens[: accepted + 1]):
        made = n + j + 1 - seq.canvas_start
        fixed[n + j] = token
        ends = token in s.stop_token_ids or (not s.ignore_eos and token in seq.model.eos_ids)
        if ends and made > s.min_tokens:
            finish = FinishReason.STOP
        elif made >= s.max_tokens or n + j + 1 >= seq.model.max_len:
            finish = FinishReason.LENGTH
        if finish:
            break
    stop = n + len(fixed)
    return Commit(
        fixed=fixed,
        kv_len=stop - 1 if draft else None,  # the last token's own K,V come with the next forward
        state=_history(seq, draft, accepted, stop) if draft else seq.policy,
        stable=stop,
        finish=finish,
        logprobs={n + j: r for j, r in enumerate(records[: len(fixed)]) if r} if records[0] else {},
        drafted=len(draft.tokens) if draft else 0,
        accepted=min(accepted, len(fixed)),
    )


def _history(seq: SequenceState, draft: Draft, accepted: int, stop: int) -> History | None:
    """State of a request whose draft lengths follow from what stood; None of others."""
    asked = seq.request.speculative
    if asked is None or asked.method == "self" or not asked.adaptive or not rejects(seq):
        return None
    return after(seq.policy, asked.num_speculative_tokens, len(draft.tokens), accepted, stop)
