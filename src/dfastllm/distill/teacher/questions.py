"""The prompts of a file as questions to a teacher, each with an identity by which its answer is found again."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dfastllm.distill.data.rows import Row, RowFile
from dfastllm.distill.teacher.cache import canonical
from dfastllm.errors import DataError

__all__ = ["Question", "on_the_wire", "read_questions", "row_fields"]


@dataclass(frozen=True)
class Question:
    """id: the row's own or, where it has none, a hash of its prompt and tools; with a number where several rows have
    the same. digest: of prompt and tools."""

    id: str
    digest: str
    row: Row

    @property
    def messages(self) -> Sequence[Mapping[str, Any]]:
        """In the form of OpenAI's API, see `on_the_wire`."""
        return on_the_wire(self.row.messages)

    @property
    def tools(self) -> Sequence[Mapping[str, Any]]:
        return [tool if "function" in tool else {"type": "function", "function": dict(tool)} for tool in self.row.tools]


def read_questions(path: str | Path, limit: int | None = None) -> tuple[list[Question], Counter[str]]:
    """The rows of a JSONL file in order, `limit` of them at most, and how many were left out for which reason. Raises
    DataError for a file that is missing, cannot be read or holds no prompt."""
    file = RowFile(path, needs_text=False)
    found: list[Question] = []
    seen: Counter[str] = Counter()
    for row in file:
        digest = hashlib.sha256(canonical([row.messages, list(row.tools)])).hexdigest()
        name = row.id if row.id is not None else digest[:16]
        id = f"{name}-{seen[name]}" if name in seen else name
        seen.update({name, id})
        found.append(Question(id, digest, row))
        if limit is not None and len(found) >= limit:
            break
    if not found:
        raise DataError(f"{path} holds no prompt that can be used; left out: {file.skips}.", param="prompts")
    return found, file.skips.counts


def on_the_wire(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A conversation as servers take it, which are stricter than chat templates: the arguments of a call are JSON text,
    a call has a type and an id, and a tool's result names the call it is of. What is missing is filled in: results
    belong to the calls before them, in order."""
    found: list[dict[str, Any]] = []
    open_calls: list[str] = []
    for at, message in enumerate(messages):
        turn = dict(message)
        if turn.get("tool_calls"):
            turn["tool_calls"] = [_call(call, f"call_{at}_{n}") for n, call in enumerate(turn["tool_calls"])]
            open_calls = [call["id"] for call in turn["tool_calls"]]
        if turn.get("role") == "tool":
            if turn.get("tool_call_id") is None and open_calls:
                turn["tool_call_id"] = open_calls[0]
            open_calls = [id for id in open_calls if id != turn.get("tool_call_id")]
        found.append(turn)
    return found


def _call(call: Mapping[str, Any], id: str) -> dict[str, Any]:
    function = dict(call.get("function") or {})
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        function["arguments"] = json.dumps({} if arguments is None else arguments, ensure_ascii=False)
    return {**call, "id": call.get("id") or id, "type": "function", "function": function}


def row_fields(row: Row) -> dict[str, Any]:
    """A row as the fields of a line, those that it has."""
    fields: dict[str, Any] = {
        "id": row.id,
        "prompt": row.prompt if isinstance(row.prompt, str) else list(row.prompt),
        "teacher_text": row.teacher_text or None,
        "source": row.source,
        "task": row.task,
        "tools": list(row.tools) or None,
        "expected": row.expected,
        "grader": row.grader,
        "tool_should_be_used": row.tool_should_be_used,
        "teacher_prefix_ids": None if row.teacher_prefix_ids is None else list(row.teacher_prefix_ids),
        "required_fields_present": row.required_fields_present,
        "teacher_attention_mask": None if row.teacher_attention_mask is None else list(row.teacher_attention_mask),
        "teacher_topk": row.teacher_topk,
        "metadata": dict(row.metadata) or None,
    }
    return {name: value for name, value in fields.items() if value is not None}
