"""Autoregressive decoding: prefill in chunks, then one token a step.

Rebuilding after a preemption is the same prefill over all tokens so far, so nothing but the tokens is state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dfastllm.core import Commit, FinishReason, ModelInfo, Request, SequenceState, Span, TokenLogprob
from dfastllm.decode.sampling import Draw, check_sampling, draw, log_normaliser, on_capable_device, token_logprobs
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
        start = min(seq.kv_len, len(seq.tokens) - 1)
        stop = min(len(seq.tokens), start + max(1, limit))
        last = (stop - start - 1,) if stop == len(seq.tokens) else ()
        return Span(start=start, ids=tuple(seq.tokens[start:stop]), attend="causal", store="keep", want=last)

    @torch.inference_mode()
    def absorb(self, items: Sequence[tuple[SequenceState, Span]], logits: torch.Tensor) -> list[Commit]:
        logits = on_capable_device(logits)
        deciding = [seq for seq, span in items if span.want]
        draws = [_draw_of(seq) for seq in deciding]
        for row, seq in enumerate(deciding):
            if seq.model.mask_id is not None:
                logits[row, seq.model.mask_id] = float("-inf")
        tokens = draw(logits, draws)
        records = _records(deciding, logits, tokens)
        ids = iter(tokens.tolist())
        return [
            _commit(seq, next(ids), records.get(id(seq))) if span.want else Commit(stable=len(seq.tokens))
            for seq, span in items
        ]


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


def _draw_of(seq: SequenceState) -> Draw:
    s, n = seq.sampling, len(seq.tokens)
    counted = bool(s.presence_penalty or s.frequency_penalty or s.repetition_penalty != 1.0)
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


def _records(seqs: Sequence[SequenceState], logits: torch.Tensor, tokens: torch.Tensor) -> dict[int, TokenLogprob]:
    """Logprob records by id(seq) of the sequences that asked for them."""
    out: dict[int, TokenLogprob] = {}
    for top in {seq.sampling.logprobs for seq in seqs} - {None}:
        rows = [r for r, seq in enumerate(seqs) if seq.sampling.logprobs == top]
        at = torch.tensor(rows, dtype=torch.long, device=logits.device)
        part = logits[at]
        records = token_logprobs(part, log_normaliser(part), tokens[at], top or 0)
        out.update((id(seqs[r]), record) for r, record in zip(rows, records, strict=True))
    return out


def _commit(seq: SequenceState, token: int, record: TokenLogprob | None) -> Commit:
    n, s = len(seq.tokens), seq.sampling
    made = n + 1 - seq.canvas_start
    finish = None
    if token in enders(s.stop_token_ids, s.ignore_eos, seq.model) and made > s.min_tokens:
        finish = FinishReason.STOP
    elif made >= s.max_tokens or n + 1 >= seq.model.max_len:
        finish = FinishReason.LENGTH
    return Commit(fixed={n: token}, stable=n + 1, finish=finish, logprobs={n: record} if record else {})
