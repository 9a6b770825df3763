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
    Tier,
    TokenLogprob,
)
from dfastllm.decode.draft.history import History, after
from dfastllm.decode.draft.verify import Cell, cells_of, choose, rejects, standing
from dfastllm.decode.policy import Compiled
from dfastllm.errors import UnsupportedError
from dfastllm.kernels.rows import Rows

__all__ = ["Autoregressive", "deciding", "draft_room", "most_tokens", "settled", "tokens_left"]


class Autoregressive:
    """The `ar` policy. Greedy or sampled; ends at EOS, a stop token, max_tokens or the model's context."""

    name = "ar"

    def room(self, request: Request, model: ModelInfo, positions: int) -> int:
        return positions - len(request.prompt)

    def compile(self, request: Request, model: ModelInfo) -> Compiled:
        """Raises UnsupportedError naming the field."""
        if model.kind != "ar":
            raise UnsupportedError(
                f"the ar decoder needs a causal model, but {model.name} is of kind {model.kind!r}.", param="model"
            )
        if request.decode is not None:
            _refuse_canvas_options(request.decode, model)
        if request.suffix:
            raise UnsupportedError(
                f"model {model.name} is autoregressive and cannot fill in before a suffix.",
                param="suffix",
                hint="Choose a diffusion model.",
            )
        tokens = most_tokens(request)
        return Compiled(_tier(request), len(request.prompt) + tokens, tokens)

    def begin(self, request: Request, model: ModelInfo, compiled: Compiled) -> tuple[list[int], Any]:
        return list(request.prompt), None

    def bound(self, compiled: Compiled) -> int:
        """Forwards after the prompt is in, at most."""
        return int(compiled.plan)

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
    return seq.ends.last - len(seq.tokens)


def most_tokens(request: Request) -> int:
    """The request's max_tokens, which admission has resolved."""
    assert request.sampling.max_tokens is not None, "max_tokens is resolved before a policy sees the request"
    return request.sampling.max_tokens


def _refuse_canvas_options(decode: DecodeParams, model: ModelInfo) -> None:
    """An option that asks for nothing is no reason to refuse a request."""
    for name in sorted(decode.given):
        value, row = getattr(decode, name), DecodeParams.TABLE[name]
        if value == row.default or (name == "rule" and value == "ar"):
            continue
        raise UnsupportedError(
            f"{name} is an option of diffusion models; {model.name!r} is autoregressive."
            if decode.rule != "ar"
            else f"rule 'ar' decodes autoregressively and has no {name}.",
            param=name,
            hint="Leave it out, or choose a diffusion model.",
        )


def _tier(request: Request) -> Tier:
    asked = request.speculative
    if asked is None or asked.method == "none":
        return Tier.REFERENCE
    hot = request.sampling.temperature > 0
    return Tier.EXACT_DISTRIBUTION if asked.acceptance == "rejection" and hot else Tier.EXACT_FAST


def settled(
    seq: SequenceState, draft: Draft | None, tokens: Sequence[int], records: Sequence[TokenLogprob | None]
) -> Commit:
    """The draft tokens that stand and the one that the row after them gives; cut where the text ends."""
    n, ends = len(seq.tokens), seq.ends
    accepted = standing(tokens, draft) if draft else 0
    fixed: dict[int, int] = {}
    finish: FinishReason | None = None
    for j, token in enumerate(tokens[: accepted + 1]):
        fixed[n + j] = token
        finish = ends.reason(n + j, token)
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
