"""A teacher's tokens as the student's: its text in the student's words, and log-probabilities by the student's ids.

A distribution over tokens can be learnt from only where both cut the text in the same places. So the log-probabilities
of an answer are kept when its tokens are, one by one, the ids into which the student's tokenizer cuts the same text; an
answer that is cut otherwise keeps its text and loses them (`Loss` says why). Servers tell tokens by id, by bytes or by
text; a token of the alternatives that no id of the student stands for is left out, and its mass is in the tail.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from dfastllm.distill.teacher.answer import Alternative, Answer, TokenRecord
from dfastllm.errors import DFastLLMError
from dfastllm.text import CallReading, ParsedMessage, Tokenizer, call_reading, chat_prompt, taught
from dfastllm.text.token_text import token_bytes

__all__ = ["Loss", "Student", "TopK", "tool_names"]

TopK = list[list[tuple[int, float]]]  # for each token of an answer: ids and natural logarithms, the best first
Loss = Literal["no_logprobs", "tokens_differ", "bad_logprobs"]
SLACK = 1e-3  # rounded probabilities may sum to so much more than 1
_REPLACED = "\ufffd".encode()  # what some servers give as the bytes of half a character


def tool_names(tools: Sequence[Mapping[str, Any]]) -> frozenset[str]:
    """Names of tools in OpenAI's form."""
    return frozenset(str(tool.get("function", tool).get("name")) for tool in tools)


@dataclass(frozen=True)
class Student:
    """The tokenizer that answers are written and cut for."""

    tokenizer: Tokenizer

    def text(
        self, answer: Answer, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
    ) -> str | None:
        """The answer as the student would write it, calls included. Where the teacher's own words for its calls are
        the student's form too they are kept, else the student's chat template writes them. None where that has no form
        for calls."""
        if not answer.calls:
            return answer.content
        try:
            reading = call_reading(self.tokenizer, tool_names(tools))
            own = self._own_words(answer)
            if own is not None and _same(reading, own, answer):
                return own
            written = self._written(answer, messages, tools)
        except DFastLLMError:
            return None
        return written if written is not None and _same(reading, written, answer) else None

    def topk(self, answer: Answer, text: str) -> TopK | Loss:
        """The log-probabilities of the answer's tokens, an entry for each token of `text` and, where the server told
        it, one for the end; or why there are none."""
        records = answer.records
        if not records:
            return "no_logprobs"
        ids = self.tokenizer.encode(text)
        if any(id in self._control for id in ids):  # a data set takes them for text, which the teacher did not
            return "tokens_differ"
        told = _told_ids(answer)
        if len(records) not in (len(ids), len(ids) + 1):
            return "tokens_differ"
        if not all(map(self._is, ids, (record.taken for record in records), told)):
            return "tokens_differ"
        if len(records) > len(ids):
            end = self._end(records[-1].taken, told[-1])
            if end is None:
                return "tokens_differ"
            ids = [*ids, end]
        rows = [self._row(record, id) for record, id in zip(records, ids, strict=True)]
        kept = [row for row in rows if row is not None]
        return kept if len(kept) == len(rows) else "bad_logprobs"

    def cut_call(self, text: str, tools: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the text opens a call and does not end it, or not with JSON, so that the server left it text."""
        try:
            reading = call_reading(self.tokenizer, tool_names(tools))
        except DFastLLMError:
            return False
        found = reading.parse(text)
        opened = any(opening in found.content for form in reading.taught.forms for opening in form.openings)
        return opened or not all(call.whole for call in found.tool_calls)

    def _own_words(self, answer: Answer) -> str | None:
        """The tokens of the answer as text, calls and all, without what ended it. None where they cannot be told."""
        ids = list(answer.token_ids if answer.token_ids is not None else _told_ids(answer))
        while ids and ids[-1] in self.tokenizer.eos_ids:
            ids.pop()
        if ids and None not in ids:
            return self.tokenizer.decode([id for id in ids if id is not None], skip_special=False)
        parts = [record.taken.data for record in answer.records]
        if not parts or None in parts:
            return None
        text = b"".join(part for part in parts if part is not None).decode("utf-8", "replace")
        return self._without_end(text)

    def _written(
        self, answer: Answer, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
    ) -> str | None:
        """The answer as the student's chat template writes it after the prompt."""
        calls = [
            {"id": f"call_{at}", "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for at, call in enumerate(answer.calls)
        ]
        turn = {"role": "assistant", "content": answer.content, "tool_calls": calls}
        prompt = chat_prompt(self.tokenizer, messages, tools).text
        whole = chat_prompt(self.tokenizer, [*messages, turn], tools, add_generation_prompt=False).text
        return self._without_end(whole.removeprefix(prompt)) if whole.startswith(prompt) else None

    def _without_end(self, text: str) -> str:
        for id in self.tokenizer.eos_ids:
            spelled = self.tokenizer.id_to_token(id)
            if spelled and text.rstrip().endswith(spelled):
                return text.rstrip().removesuffix(spelled)
        return text

    def _end(self, taken: Alternative, id: int | None) -> int | None:
        """The end token that was taken, None when it was another token. Some servers tell it without any bytes."""
        eos = self.tokenizer.eos_ids
        if id is not None:
            return id if id in eos else None
        same = (one for one in eos if self._bytes.get(one) == taken.data)
        return next(same, eos[0] if eos and taken.data == b"" else None)

    def _is(self, wanted: int, taken: Alternative, id: int | None) -> bool:
        """Whether the token that the teacher took is this one of the student."""
        if id is not None:
            return id == wanted
        data = self._bytes[wanted]
        return taken.data == data or (taken.data is not None and _REPLACED in taken.data and not _is_text(data))

    def _row(self, record: TokenRecord, taken: int) -> list[tuple[int, float]] | None:
        """Ids and logarithms of one position, the best first; None for numbers that are no log-probabilities."""
        found: dict[int, float] = {taken: record.taken.logprob}
        for other in record.top:
            id = taken if other == record.taken else self._find(other)
            if id is not None and id not in found:
                found[id] = other.logprob
        values = list(found.values())
        if not all(value <= SLACK for value in values) or sum(map(math.exp, values)) > 1 + SLACK:  # no for NaN too
            return None
        known = [(id, min(0.0, round(value, 6))) for id, value in found.items() if value > -math.inf]
        return sorted(known, key=lambda item: (-item[1], item[0]))

    def _find(self, other: Alternative) -> int | None:
        """The student's id of an alternative."""
        if other.id is not None:
            return other.id if other.id in self._bytes else None
        return self._by_bytes.get(other.data) if other.data is not None else None

    @cached_property
    def _control(self) -> frozenset[int]:
        """Special tokens that are no markup of calls."""
        ids = self.tokenizer.special_ids | frozenset(self.tokenizer.eos_ids)
        if not self.tokenizer.has_chat_template:
            return ids
        return ids - frozenset(taught(self.tokenizer.templates).shown_ids(self.tokenizer))

    @cached_property
    def _bytes(self) -> dict[int, bytes]:
        vocabulary = self.tokenizer.backend.get_vocab(with_added_tokens=True)
        return {id: token_bytes(self.tokenizer, id) for id in vocabulary.values()}

    @cached_property
    def _by_bytes(self) -> dict[bytes, int]:
        """Of several ids with the same bytes, one that is no special and no byte token, and the lowest of those."""
        odd = self.tokenizer.special_ids | self.tokenizer.byte_ids
        ranked = sorted(self._bytes, key=lambda id: (id in odd, id), reverse=True)
        return {self._bytes[id]: id for id in ranked}


def _told_ids(answer: Answer) -> list[int | None]:
    """The id of each record's token, where the server told it."""
    if answer.token_ids is not None and len(answer.token_ids) == len(answer.records):
        return list(answer.token_ids)
    return [record.taken.id for record in answer.records]


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _same(reading: CallReading, text: str, answer: Answer) -> bool:
    """Whether a text says what the server read in the answer."""
    found: ParsedMessage = reading.parse(text)
    if found.content.strip() != answer.content.strip() or len(found.tool_calls) != len(answer.calls):
        return False
    return all(
        ours.whole and ours.name == theirs.name and json.loads(ours.arguments) == json.loads(theirs.arguments)
        for ours, theirs in zip(found.tool_calls, answer.calls, strict=True)
    )
