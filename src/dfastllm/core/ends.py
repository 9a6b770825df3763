"""What ends a text: said once, at admission; policies decide by it and the emitter shows by it."""

from __future__ import annotations

from dfastllm.core.model import ModelInfo
from dfastllm.core.request import Request
from dfastllm.core.span import FinishReason
from dfastllm.core.value import value

__all__ = ["Ends"]


@value(frozen=True, slots=True)
class Ends:
    """What ends the text of one request. Positions are absolute.

    ids     token ids that end it: EOS unless ignored, and the stop tokens. An ending token is not part of the output.
    barred  ids that are not drawn before `first`: the same, and EOS even where it would be ignored (as vLLM does).
    first   position before which no token ends it: `min_tokens` after its beginning.
    last    position it cannot pass: `max_tokens` after its beginning, or the context's end.
    texts   strings that end it, found when tokens become text.
    """

    ids: frozenset[int]
    barred: tuple[int, ...]
    first: int
    last: int
    texts: tuple[str, ...] = ()

    @classmethod
    def of(cls, request: Request, model: ModelInfo) -> Ends:
        """Of a request; where its max_tokens is not resolved, the model's context alone ends it."""
        s, start = request.sampling, len(request.prompt)
        barred = tuple(dict.fromkeys(model.eos_ids + s.stop_token_ids))
        ids = frozenset(s.stop_token_ids if s.ignore_eos else barred)
        last = model.max_len - len(request.suffix)
        if s.max_tokens is not None:
            last = min(last, start + s.max_tokens)
        return cls(ids, barred, start + s.min_tokens, last, s.stop)

    def reason(self, position: int, token: int) -> FinishReason | None:
        """Why the text ends with this token at this position; None when it goes on."""
        if token in self.ids and position >= self.first:
            return FinishReason.STOP
        return FinishReason.LENGTH if position + 1 >= self.last else None
