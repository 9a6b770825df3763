"""Which answers of a teacher are not learnt from: cut ones, garbage, and texts that go round in circles.

Every rule gives its reason in a word, by which rejections are counted. What an answer is worth beside that (whether it
is right) is not judged here.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Collection

from dfastllm.distill.teacher.answer import Answer

__all__ = ["KEEPABLE", "REASONS", "is_garbage", "loops", "rejection"]

REASONS = {
    "length": "the answer reached max_tokens and is cut",
    "unfinished": "the server named no reason for its end",
    "content_filter": "the server filtered it",
    "finish_other": "it ended for another reason than its own end",
    "empty": "it has no text and no call",
    "garbage": "it holds characters that are no text",
    "repeats": "it repeats itself",
    "broken_call": "the arguments of a call are no JSON object",
    "unknown_tool": "it calls a tool that it was not given",
    "not_encodable": "the student's tokenizer cannot encode it",
    "calls_unread": "the student's chat template has no form for its calls",
}
# What a model that learns to say what the teacher would say next, token by token, can learn from all the same.
KEEPABLE = frozenset({"length", "repeats"})
_ENDED = ("stop", "tool_calls", "function_call", "eos", "eos_token", "end_turn")
_STRANGE = 0.02  # more characters than this share that are no text make garbage
_LOOP = 64  # characters that a loop at the end of a text covers at least
_TURNS = 4  # times it goes round
_TAIL = 4096  # characters of the end that are looked at
_WORDS = 64  # of a text whose phrases are counted
_PHRASE = 8  # words
_AGAIN = 0.5  # share of its phrases that came before


def rejection(answer: Answer, tools: Collection[str], keep: Collection[str] = ()) -> str | None:
    """Why an answer is not learnt from, a key of `REASONS`; None: it may be. tools: the names it was given. keep: of
    the reasons `KEEPABLE`, those that reject nothing."""
    if answer.finish_reason is None:
        return "unfinished"
    if answer.finish_reason == "content_filter" or (answer.finish_reason == "length" and "length" not in keep):
        return answer.finish_reason
    if answer.finish_reason not in (*_ENDED, "length"):
        return "finish_other"
    if answer.empty:
        return "empty"
    if not all(call.whole for call in answer.calls):
        return "broken_call"
    if not all(call.name in tools for call in answer.calls):
        return "unknown_tool"
    said = [answer.content, *(_said(json.loads(call.arguments)) for call in answer.calls)]
    if any(is_garbage(text) for text in said):
        return "garbage"
    if "repeats" not in keep and any(loops(text) for text in said):
        return "repeats"
    return None


def _said(value: object) -> str:
    """The texts of a call's arguments. JSON's own brackets and quotes go round in circles by right."""
    if isinstance(value, dict):
        return "\n".join(_said(item) for item in value.values())
    if isinstance(value, list):
        return "\n".join(_said(item) for item in value)
    return value if isinstance(value, str) else ""


def is_garbage(text: str) -> bool:
    """One character is half a surrogate pair, or more than two in a hundred are replacement characters, controls,
    private or unassigned: bytes that were read as text."""
    strange = sum(map(_is_strange, text))
    return strange > _STRANGE * len(text) or any("\ud800" <= character <= "\udfff" for character in text)


def _is_strange(character: str) -> bool:
    if character in "\t\n\r":
        return False
    return character == "\ufffd" or unicodedata.category(character) in ("Cc", "Co", "Cn")


def loops(text: str) -> bool:
    """The text ends with the same piece four times or more over 64 characters or more, or, having 64 words or more, is
    made by half of phrases of eight words that it has said before.

    The first is a loop that max_tokens or a stop ended; the second one that changes a word each round. (Rae et al.
    2021, arXiv 2112.11446, table A1, filter training text by the share of repeated n-grams, with bounds for whole
    documents.)
    """
    return _ends_in_circles(text.rstrip()[-_TAIL:]) or _says_again(text.split())


def _ends_in_circles(text: str) -> bool:
    """By the border of each prefix of the reversed text (Knuth, Morris and Pratt 1977): a prefix of n characters with a
    border of b has the period n - b."""
    backwards = text[::-1]
    border = [0] * len(backwards)
    for at in range(1, len(backwards)):
        length = border[at - 1]
        while length and backwards[at] != backwards[length]:
            length = border[length - 1]
        border[at] = length + (backwards[at] == backwards[length])
        size = at + 1
        if size >= _LOOP and (size - border[at]) * _TURNS <= size:
            return True
    return False


def _says_again(words: list[str]) -> bool:
    phrases = [tuple(words[at : at + _PHRASE]) for at in range(len(words) - _PHRASE + 1)]
    return len(words) >= _WORDS and len(phrases) - len(set(phrases)) >= _AGAIN * len(phrases)
