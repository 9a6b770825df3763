"""Answers on disk, so that a question is paid for once: a file for each request, under the hash of what was asked.

A file is written whole or not at all, before anybody counts the answer as had. One that is damaged is as one that is
not there: it is asked for and written again. No key of a server is ever in one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dfastllm.quant.partial import clear_left, part_of, storing

__all__ = ["AnswerCache", "canonical", "request_key"]

VERSION = 1


def canonical(value: Any) -> bytes:
    """The one spelling of a JSON value: sorted names, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def request_key(
    model: str, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], params: Mapping[str, Any]
) -> str:
    """sha256 of what an answer follows from, in hexadecimal."""
    asked = {"model": model, "messages": list(messages), "tools": list(tools), "params": dict(params)}
    return hashlib.sha256(canonical(asked)).hexdigest()


class AnswerCache:
    """directory: made where it is missing. damaged: files that were found and could not be used."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.damaged = 0

    def path(self, key: str) -> Path:
        return self.directory / key[:2] / f"{key}.json"

    def get(self, key: str) -> dict[str, Any] | None:
        """The server's response to this request, None where there is none that can be trusted."""
        try:
            text = self.path(key).read_bytes()
        except FileNotFoundError:
            return None
        except OSError:
            self.damaged += 1
            return None
        try:
            entry = json.loads(text)
            response = entry["response"]
            sound = entry["version"] == VERSION and entry["key"] == key and isinstance(response, dict)
            if sound and hashlib.sha256(canonical(response)).hexdigest() == entry["sha256"]:
                return dict(response)
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        self.damaged += 1
        return None

    def put(self, key: str, response: Mapping[str, Any]) -> None:
        """Keep a response. It is on the disk when this returns. Raises StorageError where it cannot be."""
        path = self.path(key)
        digest = hashlib.sha256(canonical(response)).hexdigest()
        entry = {"version": VERSION, "key": key, "sha256": digest, "response": dict(response)}
        data = json.dumps(entry, ensure_ascii=True).encode()
        part = part_of(path)
        with storing(path, len(data)):
            if not path.parent.is_dir():
                path.parent.mkdir(parents=True, exist_ok=True)
                clear_left(path.parent)
            try:
                with part.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(part, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    part.unlink()
                raise
