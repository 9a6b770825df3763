"""Bodies that cost a server more than they cost their sender, of any size: for its tests (small) and its soak (8 MB).

Each is a body that is refused by a bound before any work is done on it, with the statuses that say so; what they are
aimed at is told beside each. None of them is answered with 200 at the size of a soak.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["BOMBS", "Bomb", "filled"]

CHAT, COMPLETIONS, TOKENIZE, DETOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"
_SAY = b'"messages":[{"role":"user","content":"x"}]'


@dataclass(frozen=True)
class Bomb:
    """One kind of body.

    name      of the kind.
    path      the route it is sent to.
    make      the body of about so many bytes, for a model of that name.
    statuses  what the answer may be.
    """

    name: str
    path: str
    make: Callable[[int, bytes], bytes]
    statuses: tuple[int, ...] = (400, 413)

    def body(self, size: int, model: str = "demo-ar") -> bytes:
        """About `size` bytes, and never more than that (of 2,000 or more)."""
        return self.make(size, model.encode())


def filled(head: bytes, item: Callable[[int], bytes] | bytes, tail: bytes, size: int) -> bytes:
    """`head`, items with commas between them, `tail`: as many items as fit into `size` bytes, one at least."""
    room = size - len(head) - len(tail)
    if isinstance(item, bytes):
        return head + b",".join([item] * max(1, room // (len(item) + 1))) + tail
    items, used = [item(0)], 0
    while used + len(items[-1]) + 1 < room:
        used += len(items[-1]) + 1
        items.append(item(len(items)))
    return head + b",".join(items[:-1] or items) + tail


def _chat(start: bytes, item: Callable[[int], bytes] | bytes, end: bytes) -> Callable[[int, bytes], bytes]:
    """A chat whose other fields are `start`, many items, `end`."""
    return lambda size, model: filled(b'{"model":"' + model + b'",' + _SAY + b"," + start, item, end + b"}", size)


def _messages(item: bytes) -> Callable[[int, bytes], bytes]:
    return lambda size, model: filled(b'{"model":"' + model + b'","messages":[', item, b"]}", size)


def _prompt(start: bytes, item: Callable[[int], bytes] | bytes, end: bytes) -> Callable[[int, bytes], bytes]:
    return lambda size, model: filled(b'{"model":"' + model + b'","max_tokens":1,"prompt":' + start, item, end, size)


def _text(field: bytes) -> Callable[[int, bytes], bytes]:
    """One long text without a comma that parts it: words of a few letters."""
    return lambda size, model: filled(b'{"model":"' + model + b'","' + field + b'":"', b"brown fox ", b'"}', size)


def _one_letter(size: int, model: bytes) -> bytes:
    """One run of a letter: regular expressions of tokenizers and pair merging are slowest here."""
    head, tail = b'{"model":"' + model + b'","max_tokens":1,"prompt":"', b'"}'
    return head + b"a" * (size - len(head) - len(tail)) + tail


def _said(size: int, model: bytes) -> bytes:
    head, tail = b'{"model":"' + model + b'","messages":[{"role":"user","content":"', b'"}]}'
    return filled(head, b"brown fox ", tail, size)


def _arguments(size: int, model: bytes) -> bytes:
    """A list of numbers in the text of a call's arguments: a body within a body."""
    head = b'{"model":"' + model + b'","messages":[{"role":"user","content":"x"},{"role":"assistant","tool_calls":'
    head += b'[{"id":"abcdefghi","type":"function","function":{"name":"f","arguments":"{\\"a\\":['
    return filled(head, b"1", b']}"}}]}]}', size)


def _deep(opening: bytes, closing: bytes) -> Callable[[int, bytes], bytes]:
    def make(size: int, model: bytes) -> bytes:
        head = b'{"model":"' + model + b'",' + _SAY + b',"chat_template_kwargs":{"a":'
        times = (size - len(head) - 3) // (len(opening) + len(closing))
        return head + opening * times + b"1" + closing * times + b"}}"

    return make


def _number(size: int, model: bytes) -> bytes:
    """One whole number of millions of digits: reading it takes time that grows with the square of its length."""
    head = b'{"model":"' + model + b'","prompt":"x","seed":'
    return head + b"9" * (size - len(head) - 1) + b"}"


def _pair(value: bytes) -> Callable[[int], bytes]:
    return lambda index: b'"%d":' % index + value


_TOOL = b'{"type":"function","function":{"name":"f"}}'
_PART = b'{"type":"text","text":"x"}'

BOMBS: tuple[Bomb, ...] = (
    Bomb("wrong tools", CHAT, _chat(b'"tools":[', b"1", b"]")),
    Bomb("wrong tools that are objects", CHAT, _chat(b'"tools":[', b"{}", b"]")),
    Bomb("valid tools", CHAT, _chat(b'"tools":[', _TOOL, b"]")),
    Bomb(
        "a tool with a large schema",
        CHAT,
        _chat(b'"tools":[{"type":"function","function":{"name":"f","parameters":{', _pair(b"{}"), b"}}}]"),
    ),
    Bomb("wrong messages", CHAT, _messages(b"1")),
    Bomb("messages that are objects", CHAT, _messages(b"{}")),
    Bomb("valid messages", CHAT, _messages(b'{"role":"user","content":"x"}')),
    Bomb(
        "parts of a message",
        CHAT,
        lambda size, model: filled(
            b'{"model":"' + model + b'","messages":[{"role":"user","content":[', _PART, b"]}]}", size
        ),
    ),
    Bomb("one long message", CHAT, _said),
    Bomb("arguments of a call", CHAT, _arguments),
    Bomb("unknown fields", CHAT, _chat(b"", _pair(b"1"), b"")),
    Bomb("null fields", CHAT, _chat(b"", _pair(b"null"), b"")),
    Bomb("logit_bias", CHAT, _chat(b'"logit_bias":{', _pair(b"1"), b"}")),
    Bomb("logit_bias of texts", CHAT, _chat(b'"logit_bias":{', _pair(b'"x"'), b"}")),
    Bomb("metadata", CHAT, _chat(b'"metadata":{', _pair(b'"x"'), b"}")),
    Bomb("variables of the template", CHAT, _chat(b'"chat_template_kwargs":{', _pair(b"1"), b"}")),
    Bomb("stop texts", CHAT, _chat(b'"stop":[', b'"ab"', b"]")),
    Bomb("wrong stop texts", CHAT, _chat(b'"stop":[', b"1", b"]")),
    Bomb("stop_token_ids", CHAT, _chat(b'"stop_token_ids":[', b"1", b"]")),
    Bomb("modalities", CHAT, _chat(b'"modalities":[', b"1", b"]")),
    Bomb("deep lists", CHAT, _deep(b"[", b"]")),
    Bomb("deep objects", CHAT, _deep(b'{"a":', b"}")),
    Bomb("one long prompt", COMPLETIONS, _text(b"prompt")),
    Bomb("one letter", COMPLETIONS, _one_letter),
    Bomb("prompts", COMPLETIONS, _prompt(b"[", b'"x"', b"]}")),
    Bomb("long prompts", COMPLETIONS, _prompt(b"[", b'"' + b"brown fox " * 70 + b'"', b"]}")),
    Bomb("token ids", COMPLETIONS, _prompt(b"[", b"7", b"]}")),
    Bomb("wrong token ids", COMPLETIONS, _prompt(b"[7,", b'"x"', b"]}")),
    Bomb("lists of token ids", COMPLETIONS, _prompt(b"[", b"[7]", b"]}")),
    Bomb("empty lists", COMPLETIONS, _prompt(b"[", b"[]", b"]}")),
    Bomb(
        "echoed token ids",
        COMPLETIONS,
        lambda size, model: filled(b'{"model":"' + model + b'","echo":true,"prompt":[', b"7", b"]}", size),
    ),
    Bomb("a long number", COMPLETIONS, _number),
    Bomb("a text to tokenise", TOKENIZE, _text(b"prompt")),
    Bomb(
        "tokens to detokenise",
        DETOKENIZE,
        lambda size, model: filled(b'{"model":"' + model + b'","tokens":[', b"7", b"]}", size),
    ),
    Bomb("no JSON", CHAT, lambda size, model: b"[" + b"\x00" * (size - 1)),
)
