"""Adapters on the native runner, in float32: random interleavings and threads, against weights with the adapter merged.

`scripts/adapters` runs thousands of these."""

from __future__ import annotations

import dataclasses
import random
import threading
from pathlib import Path

import pytest

from dfastllm.core import Request
from dfastllm.engine import Worker
from dfastllm.engine.config import EngineConfig
from dfastllm.errors import AdapterNotFoundError, AdaptersBusyError
from dfastllm.kernels import native
from tests.kit.merged import Answers, write_strong
from tests.soak.adapters import FAMILIES, build, interleave, make, small_model

pytestmark = pytest.mark.skipif(native() is None, reason="the compiled kernels are not here")


@pytest.mark.parametrize("kind", FAMILIES)
def test_random_interleavings_give_what_merged_weights_give(kind: str, tmp_path: Path) -> None:
    found = interleave(kind, 8, tmp_path)
    assert not found.wrong
    assert found.ties == 0
    assert found.answers > 20


def test_the_adapters_differ(tmp_path: Path) -> None:
    """Else the test above would show nothing."""
    model = small_model("ar")
    contents = {f"{n}": write_strong(tmp_path / f"{n}", model, n) for n in (1, 2)}
    request = dataclasses.replace(make("ar", random.Random(0), "r", ""), arrival=0.0, speculative=None)
    answers = Answers(model, build, contents)
    assert len({answers(request, content) for content in ("", *contents)}) == 3


def test_requests_of_many_threads_while_others_load_and_unload(tmp_path: Path) -> None:
    """Four threads ask, one loads, replaces and unloads; two places for three adapters, so some are read again."""
    model = small_model("ar")
    contents = {f"{n}": write_strong(tmp_path / f"{n}", model, n) for n in (1, 2, 3)}
    engine = build(model, EngineConfig(kv_tokens=1024, max_sequences=4, max_loras=2))
    said: list[tuple[Request, bytes, tuple[int, ...]]] = []
    faults: list[BaseException] = []
    stop = threading.Event()
    names = {"a": "1", "b": "2"}
    for name, content in names.items():
        engine.adapters.load(name, contents[content])
    hashes = {content: engine.adapters.load(f"only{content}", path).hash for content, path in contents.items()}

    def ask(worker: Worker, number: int) -> None:
        rng = random.Random(number)
        try:
            for turn in range(8):
                request = make("ar", rng, f"t{number}-{turn}", rng.choice(["", "a", "b", "only3"]))
                try:
                    admission = engine.admit(request)
                except (AdaptersBusyError, AdapterNotFoundError):
                    continue
                tokens = tuple(t for event in worker.submit("native", admission) for t in event.token_ids)
                said.append((request, admission.lease.hash if admission.lease else b"", tokens))
        except BaseException as fault:
            faults.append(fault)

    def change() -> None:
        rng = random.Random(7)
        try:
            while not stop.wait(0.002):
                engine.adapters.load(rng.choice("ab"), contents[rng.choice("123")], replace=True)
                if rng.random() < 0.2:
                    engine.adapters.unload("a")
                    engine.adapters.load("a", contents["3"])
        except BaseException as fault:
            faults.append(fault)

    with Worker({"native": engine}) as worker:
        threads = [threading.Thread(target=ask, args=(worker, n)) for n in range(4)]
        changer = threading.Thread(target=change)
        for thread in (*threads, changer):
            thread.start()
        for thread in threads:
            thread.join()
        stop.set()
        changer.join()
    assert not faults
    assert len(said) > 12
    answers = Answers(model, build, contents)
    contents_of = {hash: content for content, hash in hashes.items()} | {b"": ""}
    for request, hash, tokens in said:
        plain = dataclasses.replace(request, request_id="alone", lora="", arrival=0.0, priority=0, speculative=None)
        assert answers(plain, contents_of[hash]) == tokens, request
    assert answers.ties == 0
    assert not engine.adapters.held()
