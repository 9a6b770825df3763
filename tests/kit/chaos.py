"""Random traffic of adapters on one engine: requests, cancels, loads, replacements, unloads and steps in any order.
Each answer is held against what it should be by the content that its name stood for when it was admitted."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from dfastllm.core import Request, StepEvent
from dfastllm.engine import Engine
from dfastllm.errors import AdaptersBusyError

__all__ = ["Alone", "Chaos", "Make"]

Make = Callable[[random.Random, str, str], Request]  # rng, request id, adapter's name -> a request
Alone = Callable[[Request, str], tuple[int, ...]]  # a request and the content it ran with -> what it should say
ACTS = {"ask": 5.0, "load": 2.0, "unload": 0.5, "cancel": 1.0, "step": 12.0}
NAMES = "abc"


class Chaos:
    """contents: directories by what is in them; "" stands for none. busy: requests refused for want of a place."""

    def __init__(self, engine: Engine, contents: Mapping[str, Path], make: Make, rng: random.Random) -> None:
        self.engine, self.contents, self.make, self.rng = engine, contents, make, rng
        self.names: dict[str, str] = {}  # an adapter's name -> the content it stands for
        self.wanted: dict[str, tuple[Request, str]] = {}
        self.got: dict[str, list[int]] = {}
        self.gone: set[str] = set()
        self.busy = 0
        self.asked = 0

    def act(self) -> None:
        """One random thing."""
        rng, engine = self.rng, self.engine
        match rng.choices([*ACTS], [*ACTS.values()])[0]:
            case "ask":
                self._ask(rng.choice(["", *self.names]))
            case "load":
                name, content = rng.choice(NAMES), rng.choice([*self.contents])
                engine.adapters.load(name, self.contents[content], replace=True)
                self.names[name] = content
            case "unload" if self.names:
                name = rng.choice([*self.names])
                engine.adapters.unload(name)
                del self.names[name]
            case "cancel" if self.wanted:
                name = rng.choice([*self.wanted])
                if engine.cancel(name):
                    self.gone.add(name)
            case "step":
                self._take(engine.step())

    def _ask(self, lora: str) -> None:
        self.asked += 1
        request = self.make(self.rng, f"r{self.asked}", lora)
        try:
            self.engine.add(request)
        except AdaptersBusyError:
            self.busy += 1
            return
        self.wanted[request.request_id] = request, self.names[lora] if lora else ""
        self.got[request.request_id] = []

    def _take(self, events: Sequence[StepEvent]) -> None:
        for event in events:
            self.got[event.request_id] += event.token_ids

    def check(self, alone: Alone) -> tuple[int, list[Request]]:
        """Run to the end. Returns (answers, those requests whose answer is not what it should be), and forgets them.
        Raises AssertionError where something is still held or lost."""
        engine = self.engine
        while engine.has_work:
            self._take(engine.step())
        wrong = []
        for name, (request, content) in self.wanted.items():
            got = tuple(self.got[name])
            wanted = alone(replace(request, request_id="alone", lora="", arrival=0.0, priority=0), content)
            if got != (wanted[: len(got)] if name in self.gone else wanted):
                wrong.append(request)
        engine.step()
        assert not engine.adapters.held()
        assert engine.pages.used == 0
        assert engine.adapters.used <= engine.config.lora_memory
        answers = len(self.wanted)
        self.wanted.clear()
        self.got.clear()
        self.gone.clear()
        return answers, wrong
