"""Token ids -> text, a few ids at a time, ending at stop strings.

The promise: the texts returned by `push` and `flush`, joined, are exactly `tokenizer.decode(all ids)` up to the stop,
however the ids are cut into pushes; and no character is returned that a later id could change. Knows no engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dfastllm.text.tokenizer import Tokenizer

__all__ = ["Detokenizer", "overlap"]

_REPLACEMENT = "\ufffd"
_WINDOW = 16  # ids decoded anew each time before a new anchor is worth looking for
_ANCHOR_TOKENS = 4  # a UTF-8 decoder forgets where it began after 4 bytes, and a decoded token has at least one


class Detokenizer:
    """One text in the making.

    stop          a match ends the text. The match that is complete first wins; of those ending together, the longest.
                  (That is what a reader of the stream sees, and does not depend on how many tokens arrive at once.)
    include_stop  whether the matched string is part of the text.
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
        context: Sequence[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._skip_special = skip_special
        self.stopped: str | None = None
        self.consumed = 0
        # Decoding goes on from an anchor, a few ids back, so that a step costs the same however long the text is.
        self._window: list[int] = []
        self._done = 0  # characters of decode(window) that were handed on
        self._held = ""  # handed on, but may be the beginning of a stop string
        if context:
            self._decode(context)
            self._done = len(self._text(self._window))

    def push(self, ids: Iterable[int]) -> str:
        """Text that became certain with these ids."""
        if self.stopped is not None:
            return ""
        if not self._stop:
            ids = list(ids)
            self.consumed += len(ids)
            return self._decode(ids)
        released = ""
        for token in ids:  # one by one, to know which id completed the stop
            self.consumed += 1
            released += self._cut(self._decode((token,)), last=False)
            if self.stopped is not None:
                break
        return released

    def flush(self) -> str:
        """All that was held back. Call once, after the last id."""
        if self.stopped is not None:
            return ""
        text = self._text(self._window)[self._done :]
        self._window, self._done = [], 0
        return self._cut(text, last=True)

    def _text(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special=self._skip_special)

    def _silent(self, token: int) -> bool:
        """The token never reaches the decoder: a special one that is skipped, or an id outside the vocabulary."""
        skipped = self._skip_special and token in self._tokenizer.special_ids
        return skipped or self._tokenizer.id_to_token(token) is None

    def _decode(self, ids: Iterable[int]) -> str:
        """Add ids; the characters of the whole text that are certain now and were not before."""
        self._window += ids
        window = self._window
        stop = self._settled()
        text = self._text(window[:stop])
        certain = len(text)
        if text.endswith(_REPLACEMENT):
            certain -= 1  # maybe the first bytes of a character
        released = text[self._done : certain]
        self._done = max(self._done, certain)
        anchor = self._anchor(stop) if len(window) >= _WINDOW else 0
        if anchor:
            self._done -= len(text) - len(self._text(window[anchor:stop]))
            del window[:anchor]
        return released

    def _settled(self) -> int:
        """End of the ids whose text can be decoded. A run of byte-fallback tokens is decoded as a whole: one bad byte
        turns every byte of its run into U+FFFD, so the run must have ended."""
        stop = len(self._window)
        if not self._tokenizer.byte_ids:
            return stop
        for index in range(len(self._window) - 1, -1, -1):
            if self._window[index] in self._tokenizer.byte_ids:
                stop = index
            elif not self._silent(self._window[index]):
                break
        return stop

    def _anchor(self, stop: int) -> int:
        """Where decoding may begin next time: enough ids that what follows them decodes as it does after the whole
        text (some text before them, so that rules for the beginning of a text are over, and four decoded ids)."""
        kept = 0
        for index in range(stop - 1, -1, -1):
            kept += not self._silent(self._window[index])
            if kept >= _ANCHOR_TOKENS and self._text(self._window[index:stop]):
                return index
        return 0

    def _cut(self, text: str, last: bool) -> str:
        """Look for stop strings in text that is certain; hold back what may become one."""
        pending = self._held + text
        end, match = min(
            ((at + len(s), s) for s in self._stop if (at := pending.find(s)) >= 0),
            key=lambda found: (found[0], -len(found[1])),
            default=(0, None),
        )
        if match is not None:
            self.stopped, self._held = match, ""
            return pending[: end if self._include_stop else end - len(match)]
        keep = 0 if last else max((overlap(pending, s) for s in self._stop), default=0)
        self._held = pending[len(pending) - keep :]
        return pending[: len(pending) - keep]


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, shorter than it."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
