"""Autoregressive decoding: prefill in chunks, then one token a step.

Rebuilding after a preemption is the same prefill over all tokens so far, so nothing but the tokens is state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from dfastllm.core import Commit, FinishReason, ModelInfo, Request, SequenceState, Span, TokenLogprob
from dfastllm.decode.rows import DenseRows, Rows, token_logprob
from dfastllm.decode.sampling import Draw, check_sampling, draw, edits, penalised
from dfastllm.errors import ContextLengthError, UnsupportedError, ValidationError

__all__ = ["Autoregressive"]


class Autoregressive:
    """The `ar` policy. Greedy or sampled; ends at EOS, a stop token, max_tokens or the model's context."""

    name = "ar"

    def check(self, request: Request, model: ModelInfo) -> None:
        """Raises ValidationError, ContextLengthError or UnsupportedError naming the field."""
        if model.kind != "ar":
            raise UnsupportedError(
                f"the ar decoder needs a causal model, but {model.name} is of kind {model.kind!r}.", param="model"
            )
        if request.decode is not None:
            raise UnsupportedError(
                f"model {model.name} is autoregressive and has no diffusion options.",
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
        return "reference"

    def plan(self, seq: SequenceState, limit: int) -> Span:
        """The rest of the known tokens, at most `limit` of them; logits of the last one only."""
        known = len(seq.tokens)
        start = min(seq.kv_len, known - 1)
        stop = min(known, start + max(1, limit))
        last = (stop - start - 1,) if stop == known else ()
        return Span(start=start, ids=tuple(seq.tokens[start:stop]), attend="causal", store="keep", want=last)

    def absorb(self, items: Sequence[tuple[SequenceState, Span]], rows: Rows) -> list[Commit]:
        deciding = [seq for seq, span in items if span.want]
        tokens, records = _choose(deciding, rows)
        chosen = zip(tokens, records, strict=True)
        return [_commit(seq, *next(chosen)) if span.want else Commit(stable=len(seq.tokens)) for seq, span in items]


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


def _choose(seqs: Sequence[SequenceState], rows: Rows) -> tuple[list[int], list[TokenLogprob | None]]:
    """The next token of each sequence, and its record where asked for. Greedy rows without edits are best tokens;
    logits are made of the others only."""
    tokens, records = [0] * len(seqs), cast("list[TokenLogprob | None]", [None] * len(seqs))
    parts: dict[str, list[int]] = {}
    for row, seq in enumerate(seqs):
        parts.setdefault(_route(seq), []).append(row)
    for route, members in parts.items():
        some = [seqs[r] for r in members]
        ban = () if some[0].model.mask_id is None else (some[0].model.mask_id,)
        part = rows if len(members) == len(seqs) else rows.select(members)
        tops = [seq.sampling.logprobs for seq in some]
        wanted = [top for top in tops if top is not None]
        if route == "logits":
            logits = part.logits()
            logits[:, list(ban)] = float("-inf")
            drawn = draw(logits, [_draw_of(seq) for seq in some])
            picked, chosen = drawn.tolist(), logits.gather(1, drawn[:, None])[:, 0].tolist() if wanted else []
            stats = DenseRows(logits).stats(norm=True, top=max(wanted)) if wanted else None
        else:
            stats = part.stats(ban=ban, norm=bool(wanted), top=max(wanted, default=0))
            picked, chosen = stats.token.tolist(), stats.best.tolist() if wanted else []
        for i, row in enumerate(members):
            tokens[row] = picked[i]
            top = tops[i]
            if top is not None and stats is not None:
                records[row] = token_logprob(stats, i, picked[i], chosen[i], top)
    return tokens, records


def _route(seq: SequenceState) -> str:
    """logits: the row is edited or drawn from; best: its best token is all; records: and the statistics of that."""
    s = seq.sampling
    early = len(seq.tokens) < seq.canvas_start + s.min_tokens
    if s.temperature > 0 or early or edits(s):
        return "logits"
    return "best" if s.logprobs is None else "records"


def _draw_of(seq: SequenceState) -> Draw:
    s, n = seq.sampling, len(seq.tokens)
    counted = penalised(s)
    return Draw(
        sampling=s,
        positions=(n,),
        seed=seq.seed,
        step=n - seq.canvas_start,
        first=seq.canvas_start,
        prompt=seq.request.prompt if counted else (),
        output=seq.tokens[seq.canvas_start :] if counted else (),
        # min_tokens bars EOS even when it would be ignored, as vLLM does
        enders=tuple(dict.fromkeys(seq.model.eos_ids + s.stop_token_ids)),
    )


def _commit(seq: SequenceState, token: int, record: TokenLogprob | None) -> Commit:
    n, s = len(seq.tokens), seq.sampling
    made = n + 1 - seq.canvas_start
    finish = None
    ends = token in s.stop_token_ids or (not s.ignore_eos and token in seq.model.eos_ids)
    if ends and made > s.min_tokens:
        finish = FinishReason.STOP
    elif made >= s.max_tokens or n + 1 >= seq.model.max_len:
        finish = FinishReason.LENGTH
    return Commit(fixed={n: token}, stable=n + 1, finish=finish, logprobs={n: record} if record else {})
