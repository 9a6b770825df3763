"""Golden transcripts: what clients and server say to each other, word for word, but for what differs at every run.

A transcript is a file of JSON lines. The first is its head: the scenario's name, its transport, the client's calls and
what each came to. Then the exchange: over HTTP `request` and `response`, over a WebSocket `client` and `server` frames,
in order. Volatile values (ids, times, versions) stand as fixed stand-ins of the same type (`settled`), so that a
transcript can be compared with a live one, and can be replayed as it is to a client.

clients/golden/record.py writes them; tests/clients replays them to the server and to the Python client,
clients/node/test to the Node client.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["ADMIN", "FOLDER", "KEY", "LIMITED", "PIPELINE", "Scenario", "Transcript", "loaded", "ordered", "settled"]

Line = Mapping[str, Any]

FOLDER = Path(__file__).parent
# Names of keys, which stand for the keys of a run: of a tenant, of those with one request a minute, of an admin.
KEY, ADMIN = "golden-key", "admin-key"
LIMITED: Mapping[str, str] = {"http": "limited-http-key", "ws": "limited-ws-key"}
# Of the server, too. Its steps follow each other, so that their events come in one order.
PIPELINE: Mapping[str, Any] = {
    "name": "golden",
    "steps": [
        {"id": "first", "model": "demo-ar", "input": "{{ input }}", "options": {"max_tokens": 8, "temperature": 0}},
        {"id": "second", "model": "demo-ar", "input": "{{ first }}", "options": {"max_tokens": 4, "temperature": 0}},
        {"id": "never", "model": "demo-ar", "input": "{{ second }}", "when": "second == ''"},
    ],
    "output": "{{ second }}",
}
_STAND_INS: Mapping[str, Any] = {
    "created": 0,
    "cached_tokens": 0,
    "time_ms": 1.5,
    "uptime_seconds": 1.0,
    "queue_seconds": 0.25,
    "first_token_seconds": 0.5,
    "total_seconds": 0.75,
    "tenant_id": "acme",
    "retry_after": 30.0,
    "retry-after": "30",
    "version": "0.0.0",
    "torch": "0.0.0",
    "python": "0.0.0",
}
_LOGPROBS = frozenset({"logprob", "token_logprobs", "top_logprobs"})  # their last bits are the machine's
_ID = re.compile(r"\b(?:(?P<kind>chatcmpl|cmpl|pipe|call)[-_][0-9a-f]{16,}|c-[0-9a-f]{32})")
_SECONDS = re.compile(r"\b\d+(?:\.\d+)? s\b")  # of messages
_SHOWN_PARAMS = frozenset({"id", "max_tokens", "messages", "pipeline", "prompt"})


@dataclass(frozen=True)
class Scenario:
    """What a client does.

    name: of the file.
    transport: "http" or "ws".
    calls: each {"method": as in Python, "args": [...]}; "cancel": true: a stream is cancelled after its first piece.
    at_once: whether the calls run together; then the frames of each are put together.
    api_key: the name of the client's key.
    """

    name: str
    transport: str
    calls: Sequence[Mapping[str, Any]]
    at_once: bool = False
    api_key: str | None = KEY


@dataclass
class Transcript:
    """outcomes: one for each call, as `scenarios.played` gives them. lines: the exchange."""

    scenario: Scenario
    outcomes: Sequence[Any]
    lines: list[Line] = field(default_factory=list)

    @property
    def path(self) -> Path:
        return FOLDER / f"{self.scenario.name}.jsonl"

    def save(self) -> None:
        head = {**vars(self.scenario), "outcomes": self.outcomes}
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in (head, *self.lines))
        self.path.write_text(text, encoding="utf-8")


def loaded() -> list[Transcript]:
    """All transcripts, by name."""
    found = []
    for path in sorted(FOLDER.glob("*.jsonl")):
        head, *lines = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
        outcomes = head.pop("outcomes")
        found.append(Transcript(Scenario(**head), outcomes, lines))
    return found


def settled(lines: Iterable[Line]) -> list[Line]:
    """The lines with stand-ins for what differs at every run. An id becomes its kind and the number in which it first
    appears, wherever it stands."""
    ids: dict[str, str] = {}

    def renamed(match: re.Match[str]) -> str:
        kind = match["kind"] or "c"
        number = sum(name.startswith(f"{kind}-") for name in ids.values())
        return ids.setdefault(match[0], f"{kind}-{number}")

    def walk(value: Any, key: str = "") -> Any:
        if key in _LOGPROBS:
            return _flat(value)
        if key in _STAND_INS and value is not None and not isinstance(value, dict | list):
            return _STAND_INS[key]
        if key == "functions":  # of metadata: which there are, and a few of their params
            return [_function(one) for one in value]
        if isinstance(value, dict):
            return {name: walk(item, name) for name, item in value.items()}
        if isinstance(value, list):
            return [walk(item) for item in value]
        if not isinstance(value, str):
            return value
        return _ID.sub(renamed, _SECONDS.sub("30 s", value) if key == "message" else value)

    return [walk(line) for line in lines]


def _flat(value: Any) -> Any:
    """The same with -0.5 for every number."""
    if isinstance(value, dict):
        return {name: _flat(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_flat(item) for item in value]
    return -0.5 if isinstance(value, float) else value


def _function(info: Mapping[str, Any]) -> Mapping[str, Any]:
    params = [{**one, "description": ""} for one in info["params"] if one["name"] in _SHOWN_PARAMS]
    return {**info, "description": "", "params": sorted(params, key=lambda one: str(one["name"]))}


def ordered(lines: Sequence[Line], at_once: bool) -> list[Line]:
    """WebSocket lines in an order that every run has. at_once: all of the client's calls, then the frames of each. A
    call that is cancelled keeps its first piece only: how many came before the end is chance."""
    cancelled = {_id(line) for line in lines if line.get("server", {}).get("status") == "cancelled"}
    kept: list[Line] = []
    begun: set[Any] = set()
    for line in lines:
        if line.get("server", {}).get("status") == "streaming" and _id(line) in cancelled:
            if _id(line) in begun:
                continue
            begun.add(_id(line))
        kept.append(line)
    if not at_once:
        return kept
    opening = [line for line in kept if _id(line) is None]
    calls = [line for line in kept if _id(line) is not None and "client" in line]
    order = {_id(line): number for number, line in enumerate(calls)}
    frames = [line for line in kept if _id(line) is not None and "server" in line]
    return [*opening, *calls, *sorted(frames, key=lambda line: order[_id(line)])]


def _id(line: Line) -> Any:
    return (line.get("client") or line.get("server") or {}).get("id")
