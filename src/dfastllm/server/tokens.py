"""Log probabilities in the two forms of the OpenAI API."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from dfastllm.core import TokenLogprob
from dfastllm.server.replies import ChatLogprobs, ChatTokenLogprob, CompletionLogprobs, TopLogprob
from dfastllm.text.token_text import token_bytes, token_text

if TYPE_CHECKING:
    from dfastllm.text import Tokenizer

__all__ = ["chat_logprobs", "completion_logprobs"]


def _spelling(tokenizer: Tokenizer, as_ids: bool) -> Callable[[int], str]:
    """How a token is written: its text or, where the client asked for ids, "token_id:123" as vLLM has it."""
    return "token_id:{}".format if as_ids else partial(token_text, tokenizer)


def completion_logprobs(
    tokenizer: Tokenizer, records: Sequence[TokenLogprob], offsets: Sequence[int], *, as_ids: bool = False
) -> CompletionLogprobs:
    """offsets: where each of these tokens begins in the text of the answer. as_ids: see `_spelling`."""
    spelt = _spelling(tokenizer, as_ids)
    top = [{spelt(t): p for t, p in reversed(record.top)} for record in records]  # the best wins a tie
    return CompletionLogprobs(
        tokens=[spelt(record.token) for record in records],
        token_logprobs=[record.logprob for record in records],
        top_logprobs=[dict(sorted(row.items(), key=lambda item: -item[1])) for row in top]
        if any(top) or not top
        else None,
        text_offset=list(offsets),
    )


def chat_logprobs(tokenizer: Tokenizer, records: Sequence[TokenLogprob], *, as_ids: bool = False) -> ChatLogprobs:
    """as_ids: see `_spelling`; the bytes are those of the token all the same."""
    spelt = _spelling(tokenizer, as_ids)

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {"token": spelt(token), "logprob": logprob, "bytes": list(token_bytes(tokenizer, token))}

    content = [
        ChatTokenLogprob(**entry(r.token, r.logprob), top_logprobs=[TopLogprob(**entry(*top)) for top in r.top])
        for r in records
    ]
    return ChatLogprobs(content=content)
