"""Admission: a request is understood once, on the caller's thread, before anything of it waits or runs.

Here what was not given is filled in (preset, model, kind of model, table; see `dfastllm.options`), token ids, context
and options are checked, and the decoder compiles its choice and makes the first tokens. What passes can be run: the
loop queues an `Admission` and checks nothing again. It knows no queue and no thread.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dfastllm.core import ModelInfo, Request, SamplingParams, SequenceState, Tier
from dfastllm.decode.presets import complete
from dfastllm.decode.registry import seen_by
from dfastllm.engine.prefix import refusal
from dfastllm.errors import ContextLengthError, UnsupportedError, ValidationError
from dfastllm.options import DecodeParams, kind_defaults, resolved

if TYPE_CHECKING:
    from dfastllm.decode.policy import Policy
    from dfastllm.engine.adapters import Adapters, Lease
    from dfastllm.engine.speculate.drafting import Drafting

__all__ = ["Admission", "Terms", "admit"]


@dataclass(frozen=True, slots=True)
class Terms:
    """What an engine admits requests on.

    info      the model; its max_len: positions that a sequence may have.
    capacity  positions of K,V of all sequences together.
    text      whether the engine has a tokenizer. choose: the policy of a request on a model as the request sees it.
    """

    info: ModelInfo
    capacity: int
    text: bool
    choose: Callable[[Request, ModelInfo], Policy]
    drafting: Drafting
    adapters: Adapters


@dataclass(frozen=True, slots=True)
class Admission:
    """A request that can be run: its options complete (`request`), its decoder and its state before the first step.

    positions  most tokens its sequence will have, prompt and suffix included.
    lease      its hold on the adapter that it asked for, None for none. Ends with the request, or when nobody has the
               admission any more.
    """

    request: Request
    policy: Policy
    state: SequenceState
    tier: Tier
    positions: int
    lease: Lease | None = None


def admit(request: Request, terms: Terms) -> Admission:
    """Raises ValidationError, UnsupportedError or ContextLengthError naming the field; of an adapter what
    `Adapters.lease` raises. Thread-safe: reads only, and holds the adapter, which may have to be read from disk."""
    if request.sampling.n != 1:
        raise ValidationError("n > 1 is several requests: submit one per choice.", param="n")
    if request.sampling.stop and not terms.text:
        raise ValidationError("stop strings need a tokenizer; this engine has none.", param="stop")
    if request.cache_salt and (reason := refusal(terms.info.kind)) is not None:
        raise UnsupportedError(
            f"cache_salt asks for prefix caching, which {terms.info.name} cannot have: {reason}.",
            param="cache_salt",
            hint="Leave it out: this model's requests share nothing.",
        )
    model = seen_by(request, terms.info)
    _check_ids(request, model)
    speculative = terms.drafting.settle(request, model)
    decode = request.decode if model.kind == "ar" else complete(request.decode or NOTHING, model)
    request = _with(request, decode=decode, speculative=speculative)
    policy = terms.choose(request, model)
    request = _with(request, sampling=_complete(request, model, policy))
    compiled = policy.compile(request, model)
    if compiled.positions > model.max_len:
        raise _too_long(request, compiled.positions, model, policy)
    if compiled.positions > terms.capacity:
        raise ContextLengthError(
            f"the request needs K,V for {compiled.positions} positions; the engine holds {terms.capacity}.",
            param="max_tokens",
            hint="Ask for fewer tokens, or give the engine more: --kv-cache-tokens, DFASTLLM_KV_CACHE_TOKENS, or "
            "EngineConfig(kv_tokens=...) in Python.",
        )
    tokens, state = policy.begin(request, model, compiled)
    seed = request.sampling.seed
    sequence = SequenceState(request, model, tokens, secrets.randbits(63) if seed is None else seed, policy=state)
    # Last, so that a request that is refused reads no file.
    lease = terms.adapters.lease(request.lora) if request.lora else None
    return Admission(request, policy, sequence, compiled.tier, compiled.positions, lease)


NOTHING = DecodeParams()


def _with(request: Request, **fields: Any) -> Request:
    """The request with other options that are right already: `dataclasses.replace` would check all of it again, and
    takes a third of an admission."""
    copy = object.__new__(Request)
    vars(copy).update(vars(request))
    vars(copy).update(fields)
    return copy


def _complete(request: Request, model: ModelInfo, policy: Policy) -> SamplingParams:
    """The sampling options with what was not given filled in. A max_tokens that was not given is what the context
    leaves, of a default at most."""
    asked = request.sampling
    sampling = resolved(asked, model.defaults, kind_defaults(model.kind))
    length, max_len = len(request.prompt) + len(request.suffix), model.max_len
    if length >= max_len:
        raise ContextLengthError(
            f"the prompt has {length} tokens; the context of {model.name} is {max_len} with the answer.",
            param="prompt",
            hint="Shorten the prompt: at least one position must be left to generate.",
        )
    if "max_tokens" in asked.given:
        assert asked.max_tokens is not None
        if length + asked.max_tokens > max_len:  # before a canvas of that length is laid out
            raise _too_long(request, length + asked.max_tokens, model, policy)
        return sampling
    room = policy.room(_with(request, sampling=sampling), model, max_len)
    tokens = room if sampling.max_tokens is None else min(room, max(sampling.max_tokens, sampling.min_tokens))
    if tokens < max(1, sampling.min_tokens):
        raise ContextLengthError(
            f"the prompt has {length} tokens; of the context of {model.name}, {max_len}, it leaves room for "
            f"{max(0, room)} new ones, less than {'min_tokens ' if sampling.min_tokens else ''}"
            f"{max(1, sampling.min_tokens)}.",
            param="min_tokens" if sampling.min_tokens else "prompt",
            hint=_shorter(request, model),
        )
    return resolved(sampling, {"max_tokens": tokens})


def _too_long(request: Request, need: int, model: ModelInfo, policy: Policy) -> ContextLengthError:
    room = policy.room(request, model, model.max_len)
    return ContextLengthError(
        f"prompt ({len(request.prompt) + len(request.suffix)}) and answer take {need} positions; the context of "
        f"{model.name} is {model.max_len}.",
        param="max_tokens",
        hint=f"Ask for at most {room} token{'s' if room > 1 else ''}." if room > 0 else _shorter(request, model),
    )


def _shorter(request: Request, model: ModelInfo) -> str:
    blocks = model.kind == "diffusion" and request.decode is not None and "block_length" in request.decode.given
    return "Shorten the prompt or lower block_length." if blocks else "Shorten the prompt."


def _check_ids(request: Request, model: ModelInfo) -> None:
    """Token ids of the vocabulary, no mask among the prompt's, and something left to draw from."""
    s = request.sampling
    _check_range("prompt", request.prompt, model)
    _check_range("suffix", request.suffix, model)
    _check_range("stop_token_ids", s.stop_token_ids, model)
    _check_range("logit_bias", tuple(s.logit_bias), model)
    if model.mask_id is not None:
        for param, ids in (("prompt", request.prompt), ("suffix", request.suffix)):
            if model.mask_id in ids:
                raise ValidationError(
                    f"the {param} holds the model's mask token, which marks what is to be generated.", param=param
                )
    if s.allowed_token_ids is None:
        return
    _check_range("allowed_token_ids", s.allowed_token_ids, model)
    left = set(s.allowed_token_ids) - {model.mask_id}
    if not left:
        raise ValidationError(
            f"allowed_token_ids must hold a token other than the mask id {model.mask_id}.", param="allowed_token_ids"
        )
    if s.min_tokens and not left - {*model.eos_ids, *s.stop_token_ids}:
        raise UnsupportedError(
            f"allowed_token_ids holds only tokens that end the text, but min_tokens is {s.min_tokens}.",
            param="allowed_token_ids",
            hint="Allow one more token or set min_tokens to 0.",
        )


def _check_range(param: str, ids: Sequence[int], model: ModelInfo) -> None:
    if ids and (min(ids) < 0 or max(ids) >= model.vocab_size):
        bad = next(i for i in ids if not 0 <= i < model.vocab_size)
        raise ValidationError(
            f"{param} holds token id {bad}; ids of {model.name} are 0 to {model.vocab_size - 1}.",
            param=param,
            hint="Encode it with this model's own tokenizer.",
        )
