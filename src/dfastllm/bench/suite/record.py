"""requests.jsonl: one line per request, written as it ends, so that a run that is killed leaves what it saw."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from dfastllm.bench.suite.figures import Measured, first_call

__all__ = ["Recorder"]


class Recorder:
    """`with Recorder(path) as record: record.write(...)`. Times are seconds; `sent` counts from the first request."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8")
        self._zero: float | None = None

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, part: str, name: str, measured: Sequence[Measured], **more: Any) -> None:
        """A line for each. name: the configuration, system prompt or load point."""
        for m in measured:
            answer = m.answer
            self._zero = answer.sent if self._zero is None else self._zero
            row = {
                "part": part,
                "name": name,
                **more,
                "type": m.prompt.type,
                "prompt": m.prompt.id,
                "round": m.round,
                "sent": round(answer.sent - self._zero, 6),
                "ttft": answer.first,
                "tpot": answer.tpot,
                "e2el": answer.end,
                "ttfa": first_call(m.prompt, answer) if m.prompt.wants_call else None,
                "wants_call": m.prompt.wants_call,
                "prompt_tokens": answer.prompt_tokens,
                "output_tokens": answer.completion_tokens,
                "tokens_source": answer.tokens_source,
                "finish_reason": answer.finish_reason,
                "correct": m.prompt.grade(answer.graded) if answer.ok else None,
                "error": answer.error,
                "message": answer.message,
                "dfastllm": answer.vendor,
                "chunks": [[round(c.at, 6), c.characters, c.tokens] for c in answer.chunks],
                "text": answer.graded,
            }
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()
