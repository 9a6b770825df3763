"""Token ids -> text, a few ids at a time, ending at stop strings; and where in that text each token begins.

The promise: the texts returned by `push` and `flush`, joined, are exactly `tokenizer.decode(all ids)` up to the stop,
however the ids are cut into pushes; and no character is returned that a later id could change. Knows no engine.

Two texts: the generated one, with special tokens, in which stop strings are looked for; and the shown one, which may
leave special tokens out. What is shown ends where the stop begins in the generated text. So a stop string may hold the
text of a special token that nobody sees, and none is found across one.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Collection, Iterable, Sequence

from dfastllm.core.value import value
from dfastllm.text.tokenizer import Tokenizer

__all__ = ["Detokenizer", "TextOffsets", "overlap"]

_REPLACEMENT = "\ufffd"
_Utf8 = codecs.getincrementaldecoder("utf-8")
_WINDOW = 16  # ids decoded anew each time before a new anchor is worth looking for
_ANCHOR_TOKENS = 4  # a UTF-8 decoder forgets where it began after 4 bytes, and a decoded token has at least one


class Detokenizer:
    """One text in the making.

    stop          a match ends the text. The match that is complete first wins; of those ending together, the longest.
                  (That is what a reader of the stream sees, and does not depend on how many tokens arrive at once.)
    include_stop  whether the matched string, as it is, is the end of the text.
    skip_special  whether the shown text leaves special tokens out; stop strings are looked for in the text with them.
    shown         special tokens that the shown text keeps when it leaves out the others.
    context       ids before the first one, whose text is not returned but which the first token joins on to
                  (SentencePiece drops a leading space only at the very beginning of a text).
    stopped       the stop string that matched, else None. Afterwards `push` and `flush` return "".
    consumed      ids up to and including the one that completed the stop, or all pushed so far.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: tuple[str, ...] = (),
        include_stop: bool = False,
        skip_special: bool = True,
        shown: Collection[int] = (),
        context: Sequence[int] = (),
    ) -> None:
        hidden = tokenizer.special_ids.difference(shown) if skip_special else frozenset()
        self._special = hidden if stop else frozenset()
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self.stopped: str | None = None
        self.consumed = 0
        self._shown = _Growing(tokenizer, hidden, context)
        self._generated: _Growing | None = None  # from the first id on of which the two texts differ
        if not self._special.isdisjoint(context):
            self._generated = _Growing(tokenizer, frozenset(), context)
        self._held: deque[_Held] = deque()

    def push(self, ids: Iterable[int]) -> str:
        """Text that became certain with these ids."""
        if self.stopped is not None:
            return ""
        if not self._stop:
            ids = list(ids)
            self.consumed += len(ids)
            return self._shown.push(ids)
        released = ""
        for token in ids:  # one by one, to know which id completed the stop
            self.consumed += 1
            self._hold(token)
            released += self._cut(last=False)
            if self.stopped is not None:
                break
        return released

    def flush(self) -> str:
        """All that was held back. Call once, after the last id."""
        if self.stopped is not None:
            return ""
        shown = self._shown.flush()
        self._held.append(_Held(self._generated.flush() if self._generated else shown, shown))
        return self._cut(last=True)

    def _hold(self, token: int) -> None:
        """What became certain of the two texts with this id."""
        if token not in self._special:
            shown = self._shown.push((token,))
            self._held.append(_Held(self._generated.push((token,)) if self._generated else shown, shown))
            return
        if self._generated is None:
            self._generated = self._shown.with_special()
        # It ends what was open in the generated text, and does not in the shown one.
        ended, open_still = "".join(self._generated.uncertain()), "".join(self._shown.uncertain())
        shown, generated = self._shown.push((token,)), self._generated.push((token,))
        self._held.append(_Held(generated[: len(ended)], shown, open_still))
        self._held.append(_Held(generated[len(ended) :], "", open_still, hidden=True))

    def _cut(self, last: bool) -> str:
        """Look for stop strings in text that is certain; hold back what may become one."""
        pending = "".join([held.generated for held in self._held])
        end, match = min(
            ((at + len(s), s) for s in self._stop if (at := pending.find(s)) >= 0),
            key=lambda found: (found[0], -len(found[1])),
            default=(0, None),
        )
        if match is not None:
            self.stopped = match
            before = self._release(end - len(match))
            return before + match if self._include_stop else before
        keep = 0 if last else max((overlap(pending, s) for s in self._stop), default=0)
        return self._release(len(pending) - keep)

    def _release(self, count: int) -> str:
        """The shown text of the first `count` held characters of the generated one; where a stop was found, all that is
        shown before it."""
        released = ""
        while self._held:
            held = self._held.popleft()
            rest = len(held.generated) - count
            if rest <= 0:
                count = -rest
                released += held.shown
                continue
            # Of an id that is cut the texts agree at the end: what one lacks (a space that begins a text, half a
            # character) is at the beginning.
            if self.stopped is None:
                at = max(0, len(held.shown) - rest)
                self._held.appendleft(_Held(held.generated[count:], held.shown[at:], held.open, held.hidden))
                return released + held.shown[:at]
            text = held.shown + held.open
            return released + (text if held.hidden else text[: max(0, len(text) - rest)])
        return released


@value(frozen=True, slots=True)
class _Held:
    """Text of one id that is certain, but not handed on: it may be the beginning of a stop string.

    open    text before the id that is shown only if nothing follows: its last character may be half a one.
    hidden  a special token that is not shown.
    """

    generated: str
    shown: str
    open: str = ""
    hidden: bool = False


class TextOffsets:
    """Where the text of each token begins, in characters of the text that its ids decode to.

    A token that goes on with a character begins where the character does; one without text, where the next text will.
    Of a run of byte-fallback tokens that turns out to be no UTF-8, whose bytes become a U+FFFD each, the offsets given
    before that was known are those of the characters it could have been.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True, start: int = 0) -> None:
        """start: the offset of the first token."""
        self._text = _Growing(tokenizer, tokenizer.special_ids if skip_special else frozenset())
        self._before = start  # characters that are certain
        self._run = b""  # the open run of byte-fallback tokens

    def push(self, ids: Iterable[int]) -> list[int]:
        """The offset of each of these ids."""
        return [self._next(token) for token in ids]

    def _next(self, token: int) -> int:
        settled, open_run = self._text.uncertain()
        start = self._before
        certain = self._text.push((token,))
        self._before += len(certain)
        byte, silent = self._text.byte_of(token), self._text.silent(token)
        if byte is not None or (silent and self._run):
            at = start + len(settled) + _characters(self._run)
            self._run += b"" if byte is None else bytes([byte])
            return at
        if silent:
            return start
        self._run = b""
        before, text = settled + open_run, certain + "".join(self._text.uncertain())
        most = min(len(before), len(text) - text.endswith(_REPLACEMENT))
        return start + next((n for n in range(most) if before[n] != text[n]), most)


def _characters(data: bytes) -> int:
    """Whole characters of bytes that may end within one; as many as there are bytes where they are no UTF-8."""
    try:
        return len(_Utf8().decode(data))
    except UnicodeDecodeError:
        return len(data)


class _Growing:
    """The text of ids that come one after another, without those of `hidden`. Decoding goes on from an anchor, a few
    ids back, so that a step costs the same however long the text is."""

    def __init__(self, tokenizer: Tokenizer, hidden: frozenset[int], context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._hidden = hidden
        self._window: list[int] = []
        self._done = 0  # characters of decode(window) that were handed on
        if context:
            self.push(context)
            self._done = len(self._decode(self._window))

    def with_special(self) -> _Growing:
        """The same text, in which special tokens are text from now on; it must not have hidden any."""
        other = _Growing(self._tokenizer, frozenset())
        other._window, other._done = self._window.copy(), self._done
        return other

    def push(self, ids: Iterable[int]) -> str:
        """Add ids; the characters of the whole text that are certain now and were not before."""
        self._window += ids
        window = self._window
        stop = self._settled()
        text = self._decode(window[:stop])
        certain = len(text)
        if text.endswith(_REPLACEMENT):
            certain -= 1  # maybe the first bytes of a character
        released = text[self._done : certain]
        self._done = max(self._done, certain)
        anchor = self._anchor(stop) if len(window) >= _WINDOW else 0
        if anchor:
            self._done -= len(text) - len(self._decode(window[anchor:stop]))
            del window[:anchor]
        return released

    def flush(self) -> str:
        """All that was not certain."""
        text = self._decode(self._window)[self._done :]
        self._window, self._done = [], 0
        return text

    def uncertain(self) -> tuple[str, str]:
        """What follows the certain text: of the ids whose text can be decoded, and of an open run of byte-fallback
        tokens as it stands."""
        settled = self._decode(self._window[: self._settled()])
        return settled[self._done :], self._decode(self._window)[len(settled) :]

    def byte_of(self, token: int) -> int | None:
        """The byte of a byte-fallback token."""
        if token not in self._tokenizer.byte_ids:
            return None
        return int((self._tokenizer.id_to_token(token) or "")[3:5], 16)  # <0xE4>

    def silent(self, token: int) -> bool:
        """The token never reaches the decoder: a special one that is skipped, or an id outside the vocabulary."""
        return token in self._hidden or self._tokenizer.id_to_token(token) is None

    def _decode(self, ids: Sequence[int]) -> str:
        shown = [token for token in ids if token not in self._hidden] if self._hidden else ids
        return self._tokenizer.decode(shown, skip_special=False)

    def _settled(self) -> int:
        """End of the ids whose text can be decoded. A run of byte-fallback tokens is decoded as a whole: one bad byte
        turns every byte of its run into U+FFFD, so the run must have ended."""
        stop = len(self._window)
        if not self._tokenizer.byte_ids:
            return stop
        for index in range(len(self._window) - 1, -1, -1):
            if self._window[index] in self._tokenizer.byte_ids:
                stop = index
            elif not self.silent(self._window[index]):
                break
        return stop

    def _anchor(self, stop: int) -> int:
        """Where decoding may begin next time: enough ids that what follows them decodes as it does after the whole
        text (some text before them, so that rules for the beginning of a text are over, and four decoded ids)."""
        kept = 0
        for index in range(stop - 1, -1, -1):
            kept += not self.silent(self._window[index])
            if kept >= _ANCHOR_TOKENS and self._decode(self._window[index:stop]):
                return index
        return 0


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, shorter than it."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
