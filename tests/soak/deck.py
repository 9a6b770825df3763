"""What is asked: a deck of requests of all kinds drawn by a seed, and what of an answer must be the same every time."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dfastllm.tasks import draw

__all__ = ["MODELS", "Choice", "Question", "assembled", "deck", "outcome"]

MODELS = ("demo-ar", "demo-diffusion", "demo-block")
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@dataclass(frozen=True)
class Question:
    """A request whose answer is the same every time: greedy, or seeded."""

    path: str
    body: Mapping[str, Any]

    def data(self, **more: Any) -> bytes:
        return json.dumps({**self.body, **more}).encode()


@dataclass
class Choice:
    """What is compared of one choice. A stream's parts are put together in it."""

    text: str = ""
    finish: str | None = None
    calls: list[list[str]] = field(default_factory=list)  # [name, arguments]
    tokens: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def add(self, part: Mapping[str, Any]) -> None:
        """A choice of a whole answer, or of a chunk of a stream."""
        said = part.get("message") or part.get("delta") or {"content": part.get("text")}
        self.text += said.get("content") or ""
        self.finish = part.get("finish_reason") or self.finish
        for at, call in enumerate(said.get("tool_calls") or ()):
            index = call.get("index", at)
            while len(self.calls) <= index:
                self.calls.append(["", ""])
            function = call["function"]
            self.calls[index][0] += function.get("name") or ""
            self.calls[index][1] += function.get("arguments") or ""
        seen = part.get("logprobs") or {}
        for token in seen.get("content") or ():
            self.tokens.append(token["token"])
            self.logprobs.append(token["logprob"])
        self.tokens += seen.get("tokens") or ()
        self.logprobs += [value or 0.0 for value in seen.get("token_logprobs") or ()]


def outcome(answer: Mapping[str, Any]) -> list[Choice]:
    """The choices of a whole answer, in order."""
    return assembled([answer])


def assembled(parts: Iterable[Mapping[str, Any]]) -> list[Choice]:
    """The choices of a stream, in order."""
    found: dict[int, Choice] = {}
    for part in parts:
        for choice in part.get("choices", ()):
            found.setdefault(choice["index"], Choice()).add(choice)
    return [found[index] for index in sorted(found)]


def deck(seed: int, count: int) -> list[Question]:
    """`count` requests; the models take turns."""
    rng = random.Random(seed)
    return [_question(rng, MODELS[index % len(MODELS)], seed * 100_000 + index) for index in range(count)]


def _question(rng: random.Random, model: str, index: int) -> Question:
    sample = draw("test", 0, index)
    most = rng.choice((8, 24, 48, 96))
    body: dict[str, Any] = {"model": model, "max_tokens": most, "seed": rng.randrange(1000)}
    body["temperature"] = rng.choice((0, 0, 0.7, 1.0))
    for name, values, share in (
        ("top_p", (0.9,), 0.2),
        ("top_k", (20,), 0.2),
        ("n", (2, 3), 0.25),
        ("stop", ([" is"], ["\n", "e"], ["zzz"]), 0.25),
        ("min_tokens", (4,), 0.15),
        ("ignore_eos", (True,), 0.15),
        ("presence_penalty", (0.5,), 0.1),
        ("repetition_penalty", (1.2,), 0.1),
        ("logit_bias", ({"7": 5},), 0.1),
        ("priority", (-1, 1), 0.2),
    ):
        if rng.random() < share:
            body[name] = rng.choice(values)
    body |= _decoding(rng, model)
    logprobs = rng.random() < 0.2
    if rng.random() < 0.35:
        body["prompt"] = "\n".join(str(message["content"]) for message in sample.messages)
        body |= {"logprobs": 2} if logprobs else {}
        return Question(COMPLETIONS, body)
    body["messages"] = list(sample.messages)
    body |= {"tools": list(sample.tools)} if sample.tools else {}
    body |= {"logprobs": True, "top_logprobs": 2} if logprobs else {}
    return Question(CHAT, body)


def _decoding(rng: random.Random, model: str) -> dict[str, Any]:
    if model == "demo-ar":
        return rng.choice(({}, {}, {"speculative_config": {"method": "none"}}))
    rules: tuple[dict[str, Any], ...] = ({}, {"threshold": 0.8}, {"factor": 1.5})
    if model == "demo-block":
        return rng.choice(rules)
    cache = rng.choice(("none", "prefix", "dual"))
    return {"cache": cache, **rng.choice((*rules, {"rule": "free_dave", "cache": "none"}))}
