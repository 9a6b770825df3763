"""Server-sent events: bytes as they arrive to the JSON objects of their data lines. No I/O."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Mapping
from typing import Any

from .errors import ProtocolError

__all__ = ["EventReader"]


class EventReader:
    """Feed it bytes cut anywhere. done: the server said `[DONE]`: the stream is whole."""

    def __init__(self) -> None:
        self.done = False
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._rest = ""

    def feed(self, data: bytes) -> Iterator[Mapping[str, Any]]:
        """The objects that are complete with `data`. Raises ProtocolError for data that is no JSON object."""
        self._rest += self._decoder.decode(data)
        *lines, self._rest = self._rest.split("\n")
        for line in lines:
            if not line.startswith("data:"):
                continue  # an empty line ends an event; a comment keeps the connection open
            text = line[5:].strip()
            if text == "[DONE]":
                self.done = True
                continue
            yield _object(text)


def _object(text: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ProtocolError(f"An event that is no JSON: {text[:200]!r}") from error
    if not isinstance(value, dict):
        raise ProtocolError(f"An event that is no object: {text[:200]!r}")
    return value
