"""Adapters in the engine: no request is ever answered with another adapter's weights or K,V.

The model is a hash of all that a row may depend on, its adapter's content included, so any mix-up changes tokens.
Seven ways in which other servers got it wrong are a test each; then random loads, unloads, requests and cancels.
"""

from __future__ import annotations

import gc
import random
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dfastllm.core import DecodeParams, FinishReason, Request, SamplingParams, Span, SpeculativeParams
from dfastllm.engine import Engine, Worker
from dfastllm.engine.adapters import Adapters
from dfastllm.engine.batch import pack
from dfastllm.engine.pages import Pages, PageTable
from dfastllm.errors import (
    AdapterError,
    AdapterNotFoundError,
    AdaptersBusyError,
    CancelledError,
    GenerationError,
    NotReadyError,
    TimeoutError,
    ValidationError,
)
from tests.kit.adapted import adapted_engine, read_fake, write_fake
from tests.kit.chaos import Chaos

KINDS = ("ar", "block", "diffusion")
PROMPT = tuple((5 * i) % 45 for i in range(21))
SHARING = pytest.mark.parametrize("kind", ["ar", "block"])
EVERY = pytest.mark.parametrize("kind", KINDS)


def ask(name: str, lora: str = "", prompt: tuple[int, ...] = PROMPT, tokens: int = 8, **more: Any) -> Request:
    return Request(name, prompt, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True), lora=lora, **more)


def run(engine: Engine, limit: int = 4000) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Request id -> (tokens, finish) of all that runs."""
    tokens: dict[str, tuple[int, ...]] = {}
    ends: dict[str, Any] = {}
    for _ in range(limit):
        if not engine.has_work:
            break
        for event in engine.step():
            tokens[event.request_id] = tokens.get(event.request_id, ()) + event.token_ids
            ends[event.request_id] = event.finish or ends.get(event.request_id)
    assert not engine.has_work
    return {name: (tokens[name], ends[name]) for name in tokens}


def answer(engine: Engine, request: Request) -> tuple[int, ...]:
    engine.add(request)
    return run(engine)[request.request_id][0]


class Shelf:
    """Directories of adapters, and what requests give that run on an engine of their own with one of them."""

    def __init__(self, root: Path, kind: str) -> None:
        self.root, self.kind = root, kind
        self._alone: dict[str, tuple[int, ...]] = {}

    def put(self, name: str, content: bytes) -> Path:
        return write_fake(self.root / name, content)

    def load(self, engine: Engine, name: str, content: bytes, **how: Any) -> None:
        engine.adapters.load(name, self.put(name, content), **how)

    def alone(self, request: Request, content: bytes | None) -> tuple[int, ...]:
        plain = replace(request, request_id="alone", lora="" if content is None else "its", arrival=0.0, timeout=None)
        key = repr((plain, content))
        if key not in self._alone:
            engine = adapted_engine(self.kind)
            if content is not None:
                self.load(engine, "its", content)
            self._alone[key] = answer(engine, plain)
        return self._alone[key]


@pytest.fixture
def shelf(tmp_path: Path, kind: str) -> Shelf:
    return Shelf(tmp_path, kind)


@EVERY
def test_the_fake_tells_adapters_apart(kind: str, shelf: Shelf) -> None:
    """Else the tests below would show nothing."""
    answers = {shelf.alone(ask("r"), content) for content in (None, b"a", b"b", b"a2")}
    assert len(answers) == 4


# ---- seven ways to get it wrong --------------------------------------------------------------------------------------


@EVERY
def test_1_what_is_loaded_at_run_time_changes_no_request_in_flight(kind: str, shelf: Shelf) -> None:
    engine = adapted_engine(kind)
    shelf.load(engine, "a", b"a")
    for name, lora in (("plain", ""), ("adapted", "a")):
        engine.add(ask(name, lora))
    got: dict[str, list[int]] = {"plain": [], "adapted": [], "later": []}

    def step() -> None:
        for event in engine.step():
            got[event.request_id] += event.token_ids

    step()
    shelf.load(engine, "b", b"b")
    step()
    shelf.load(engine, "a", b"a2", replace=True)
    engine.add(ask("later", "a"))
    step()
    engine.adapters.unload("a")
    while engine.has_work:
        step()
    for name, content in (("plain", None), ("adapted", b"a"), ("later", b"a2")):
        assert tuple(got[name]) == shelf.alone(ask(name), content), name


@SHARING
def test_2_two_adapters_of_one_name_share_no_page(kind: str, shelf: Shelf) -> None:
    """One name in two engines, one after the other in one engine, and the same content under two names."""
    engine = adapted_engine(kind, cut_free=True)
    for content in (b"a", b"b"):
        shelf.load(engine, "a", content)
        engine.add(ask(f"of {content!r}", "a"))
        tokens, finish = run(engine)[f"of {content!r}"]
        assert tokens == shelf.alone(ask("r"), content)
        assert finish.usage.cached_tokens == 0
        engine.adapters.unload("a")
    shelf.load(engine, "another name", b"b")
    engine.add(ask("shares", "another name"))
    tokens, finish = run(engine)["shares"]
    assert (tokens, finish.usage.cached_tokens > 0) == (shelf.alone(ask("r"), b"b"), True)


@SHARING
def test_3_a_reload_reuses_no_page_of_the_older_version(kind: str, shelf: Shelf) -> None:
    engine = adapted_engine(kind, cut_free=True)
    for round, content in enumerate((b"first", b"second", b"first")):
        shelf.load(engine, "a", content, replace=True)
        engine.add(ask(f"{round}", "a"))
        tokens, finish = run(engine)[f"{round}"]
        assert tokens == shelf.alone(ask("r"), content)
        assert (finish.usage.cached_tokens > 0) == (round == 2), "the first version's pages are right again"


@SHARING
def test_4_a_prompts_pages_serve_the_same_adapter_only(kind: str, shelf: Shelf) -> None:
    engine = adapted_engine(kind, cut_free=True)
    for name, content in (("a", b"a"), ("b", b"b")):
        shelf.load(engine, name, content)
    contents = {"": None, "a": b"a", "b": b"b"}
    seen: set[str] = set()
    for number, lora in enumerate(["", "a", "b", "a", "", "b"]):
        engine.add(ask(f"r{number}", lora))
        tokens, finish = run(engine)[f"r{number}"]
        assert tokens == shelf.alone(ask("r"), contents[lora])
        assert (finish.usage.cached_tokens > 0) == (lora in seen)
        seen.add(lora)


@EVERY
def test_5_an_evicted_adapter_is_read_again_and_answers_as_before(kind: str, shelf: Shelf) -> None:
    engine = adapted_engine(kind, max_loras=1)
    contents = {"a": b"a", "b": b"b", "c": b"c"}
    for name, content in contents.items():
        shelf.load(engine, name, content)
    for number, lora in enumerate("abcabca"):
        assert answer(engine, ask(f"r{number}", lora)) == shelf.alone(ask("r"), contents[lora])
        assert engine.adapters.in_memory(lora)
    assert engine.adapters.evictions == 2 + 7
    assert engine.adapters.loads == 3 + 7


@EVERY
def test_6_several_adapters_in_one_batch(kind: str, shelf: Shelf) -> None:
    engine = adapted_engine(kind, kv_tokens=2048)
    contents: dict[str, bytes | None] = {"": None, "a": b"a", "b": b"b", "c": b"c", "d": b"d"}
    for name, content in contents.items():
        if content is not None:
            shelf.load(engine, name, content)
    asked = {f"{lora}{turn}": (lora, (turn, *PROMPT[turn:])) for lora in contents for turn in range(3)}
    for name, (lora, prompt) in asked.items():
        engine.add(ask(name, lora, prompt))
    got = run(engine)
    runner: Any = engine.runner
    assert runner.mixed == 5
    for name, (lora, prompt) in asked.items():
        assert got[name][0] == shelf.alone(ask("r", prompt=prompt), contents[lora]), name


@SHARING
def test_7_no_adapter_keeps_pages_or_memory_for_ever(kind: str, shelf: Shelf) -> None:
    """Pages that one adapter's requests filled are given to others when these need them, and come back in the end."""
    engine = adapted_engine(kind, cut_free=True, kv_tokens=128, max_loras=2, lora_memory=40)
    shelf.load(engine, "greedy", b"g" * 20)
    for number in range(8):
        answer(engine, ask(f"g{number}", "greedy", (number, *PROMPT)))
    assert engine.pages.idle == engine.pages.count - engine.pages.used - len(engine.pages._blank)
    assert engine.pages.idle > engine.pages.count // 2
    evicted = engine.pages.evicted
    for number in range(6):
        content = b"%d" % number * 20
        shelf.load(engine, f"n{number}", content)
        prompt = (40, number, *PROMPT)
        assert answer(engine, ask(f"r{number}", f"n{number}", prompt)) == shelf.alone(ask("r", prompt=prompt), content)
        assert engine.adapters.used <= 40
    assert engine.pages.evicted > evicted
    assert engine.pages.used == 0
    assert not engine.adapters.held()


# ---- holding and letting go ------------------------------------------------------------------------------------------


@EVERY
def test_however_a_request_ends_it_lets_go(kind: str, shelf: Shelf) -> None:
    engine = adapted_engine(kind, max_sequences=2)
    shelf.load(engine, "a", b"a")
    engine.add(ask("ends", "a"))
    engine.add(ask("cancelled", "a"))
    engine.add(ask("waits", "a"))
    engine.add(ask("late", "a", timeout=1e-9))
    engine.step()
    assert list(engine.adapters.held().values()) == [3]
    engine.cancel("cancelled")
    engine.cancel("waits")
    assert list(engine.adapters.held().values()) == [1]
    assert {name: finish.reason for name, (_, finish) in run(engine).items()}["ends"] is FinishReason.LENGTH
    assert not engine.adapters.held()
    engine.add(ask("abandoned", "a"))
    engine.step()
    engine.abandon(GenerationError("told to"))
    assert not engine.adapters.held()
    engine.add(ask("twice", "a"))
    with pytest.raises(ValidationError, match="in use"):
        engine.add(ask("twice", "a"))
    run(engine)
    gc.collect()
    assert not engine.adapters.held()


def test_an_admission_that_is_never_run_lets_go(tmp_path: Path) -> None:
    engine = adapted_engine("ar")
    engine.adapters.load("a", write_fake(tmp_path / "a", b"a"))
    admission = engine.admit(ask("r", "a"))
    assert list(engine.adapters.held().values()) == [1]
    del admission
    assert not engine.adapters.held()
    worker = Worker({"fake": engine})
    with pytest.raises(NotReadyError):
        worker.submit("fake", ask("r", "a"))
    assert not engine.adapters.held()


def test_a_step_that_fails_lets_go(tmp_path: Path) -> None:
    engine = adapted_engine("ar")
    engine.adapters.load("a", write_fake(tmp_path / "a", b"a"))
    model: Any = engine.model
    model.fail_on = PROMPT[3]
    with Worker({"fake": engine}) as worker:
        with pytest.raises(GenerationError):
            list(worker.submit("fake", ask("r", "a")))
        stream = worker.submit("fake", ask("late", "a", (1, 2), timeout=1e-9))
        with pytest.raises(TimeoutError):
            list(stream)
        stream = worker.submit("fake", ask("gone", "a", (1, 2), 400))
        stream.cancel()
        with pytest.raises(CancelledError):
            list(stream)
        assert not engine.adapters.held()


def test_what_requests_hold_is_never_evicted(tmp_path: Path) -> None:
    engine = adapted_engine("ar", max_loras=1)
    for name in "ab":
        engine.adapters.load(name, write_fake(tmp_path / name, name.encode()))
    engine.add(ask("r", "a"))
    with pytest.raises(AdaptersBusyError, match="--max-loras") as refused:
        engine.admit(ask("s", "b"))
    assert refused.value.param == "lora"
    assert engine.adapters.in_memory("a")
    engine.adapters.unload("a")  # the request goes on, and nobody else gets it
    with pytest.raises(AdapterNotFoundError, match=r"'a'.*: b"):
        engine.admit(ask("t", "a"))
    run(engine)
    engine.add(ask("s", "b"))
    run(engine)


def test_an_unloaded_adapter_leaves_memory_with_its_last_request(tmp_path: Path) -> None:
    engine = adapted_engine("ar")
    engine.adapters.load("a", write_fake(tmp_path / "a", b"a"))
    engine.add(ask("r", "a"))
    engine.step()
    engine.adapters.unload("a")
    assert engine.adapters.used == 1
    run(engine)
    engine.step()
    assert engine.adapters.used == 0
    runner: Any = engine.runner
    assert runner.table == [None]


def test_a_preempted_request_keeps_its_adapter(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, "ar")
    engine = adapted_engine("ar", kv_tokens=64, max_sequences=4, prefix_caching=False)
    for name in "abcd":
        shelf.load(engine, name, name.encode())
        engine.add(ask(name, name, (*PROMPT, ord(name) % 40), tokens=20))
    got = run(engine)
    assert engine.scheduler.preempted > 0
    for name in "abcd":
        assert got[name][0] == shelf.alone(ask("r", prompt=(*PROMPT, ord(name) % 40), tokens=20), name.encode())


@pytest.mark.parametrize("method", ["ngram", "suffix"])
def test_drafts_stay_lossless(method: Any, tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, "ar")
    engine = adapted_engine("ar")
    prompt = (1, 2, 3, 4) * 5
    speculative = SpeculativeParams(method, prompt_lookup_min=1, adaptive=False)
    for name in "ab":
        shelf.load(engine, name, name.encode())
        engine.add(ask(name, name, prompt, 40, speculative=speculative))
    got = run(engine)
    for name in "ab":
        tokens, finish = got[name]
        assert finish.usage.draft_tokens > 0
        assert tokens == shelf.alone(ask("r", prompt=prompt, tokens=40), name.encode())


def test_every_row_of_a_span_and_its_branches_carries_the_number() -> None:
    from dfastllm.core import Branch

    pages = Pages(8, 16)
    tables = [PageTable(pages) for _ in range(3)]
    for table in tables:
        table.grow(16)
    spans = [
        Span(0, (1, 2, 3), "causal", "keep", want=(2,)),
        Span(0, (4, 5), "full", "none", want=(1,), branches=(Branch(0, (6, 7), (0,)), Branch(1, (8,), (0,)))),
        Span(0, (9,), "full", "scratch", want=(0,), shadows=((0, 5),)),
    ]
    items = [(span, table, 0) for span, table in zip(spans, tables, strict=True)]
    assert pack(items, 16, [4, 7, 0]).adapter.tolist() == [4] * 3 + [7] * 5 + [0] * 2
    assert not pack(items, 16).adapter.any()


# ---- names and directories -------------------------------------------------------------------------------------------


def adapters(most: int = 4, memory: int = 1000) -> Adapters:
    return Adapters(read_fake, most, memory)


@pytest.mark.parametrize("name", ["", " a", "base:a"])
def test_names_that_cannot_be(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValidationError) as refused:
        adapters().load(name, write_fake(tmp_path / "a", b"a"))
    assert refused.value.param == "lora_name"


def test_a_name_is_replaced_only_where_that_is_asked(tmp_path: Path) -> None:
    held = adapters()
    held.load("a", write_fake(tmp_path / "a", b"a"))
    with pytest.raises(ValidationError, match="loaded already"):
        held.load("a", write_fake(tmp_path / "b", b"b"))
    assert held.find("a").path.name == "a"
    held.load("a", tmp_path / "b", replace=True)
    assert held.find("a").path.name == "b"
    assert held.used == 1


def test_a_directory_that_changed_or_went_since_is_refused_by_name(tmp_path: Path) -> None:
    held = adapters(most=1)
    held.load("a", write_fake(tmp_path / "a", b"a"))
    held.load("b", write_fake(tmp_path / "b", b"b"))
    write_fake(tmp_path / "a", b"other")
    with pytest.raises(AdapterError, match=r"'a' was evicted, and .* is not what it was"):
        held.lease("a")
    (tmp_path / "a" / "weights").unlink()
    with pytest.raises(AdapterError, match="'a' was evicted and cannot be read again"):
        held.lease("a")
    assert held.lease("b").name == "b"


def test_one_that_never_fits_is_refused_and_leaves_all_as_it_was(tmp_path: Path) -> None:
    held = adapters(memory=10)
    held.load("a", write_fake(tmp_path / "a", b"12345"))
    with pytest.raises(AdapterError, match="11 bytes; 10"):
        held.load("b", write_fake(tmp_path / "b", b"1" * 11))
    assert [named.name for named in held.named()] == ["a"]
    assert held.in_memory("a")


def test_numbers_go_on_only_when_nobody_holds_them(tmp_path: Path) -> None:
    held = adapters(most=2)
    for name in "abc":
        held.load(name, write_fake(tmp_path / name, name.encode()))
    first = held.lease("a")
    second = held.lease("b")
    assert {first.number, second.number} == {1, 2}
    table = held.table()
    assert table is not None
    assert (table[first.number], table[second.number]) == (first.adapter, second.adapter)
    assert held.table() is None
    second.release()
    second.release()
    third = held.lease("c")
    assert third.number == second.number
    table = held.table()
    assert table is not None
    assert (table[first.number], table[third.number]) == (first.adapter, third.adapter)
    assert held.held() == {first.hash: 1, third.hash: 1}


def test_a_read_holds_nobody_up(tmp_path: Path) -> None:
    """While a directory is read, what is in memory can be leased, and the engine gets its table."""
    begun, go = threading.Event(), threading.Event()

    def slow(path: Path) -> Any:
        if path.name == "slow":
            begun.set()
            assert go.wait(20)
        return read_fake(path)

    held = Adapters(slow, 4, 1000)
    held.load("a", write_fake(tmp_path / "a", b"a"))
    thread = threading.Thread(target=held.load, args=("b", write_fake(tmp_path / "slow", b"b")))
    thread.start()
    assert begun.wait(20)
    assert held.lease("a").name == "a"
    assert held.table() is not None
    with pytest.raises(AdapterNotFoundError):
        held.lease("b")
    go.set()
    thread.join()
    assert held.lease("b").name == "b"


# ---- everything at once ----------------------------------------------------------------------------------------------


CONTENTS = ("1", "22", "333", "4444")


def random_request(kind: str, rng: random.Random, name: str, lora: str) -> Request:
    """One of few different requests, so that most of what they should say is known already."""
    decode = speculative = None
    if kind != "ar":
        decode = rng.choice((DecodeParams(), DecodeParams(rule="threshold", threshold=0.3, block_length=4)))
    elif rng.random() < 0.3:
        speculative = SpeculativeParams("ngram", prompt_lookup_min=1, adaptive=False)
    return Request(
        name,
        PROMPT[: rng.choice((9, 14, 21))],
        SamplingParams(max_tokens=rng.choice((4, 8)), temperature=rng.choice((0.0, 0.9)), seed=1),
        decode,
        speculative=speculative,
        priority=rng.randrange(2),
        lora=lora,
    )


@EVERY
def test_random_interleavings(kind: str, shelf: Shelf) -> None:
    contents = {content: shelf.put(content, content.encode()) for content in CONTENTS}

    def alone(request: Request, content: str) -> tuple[int, ...]:
        return shelf.alone(replace(request, speculative=None), content.encode() or None)

    asked = busy = evictions = preempted = 0
    for seed in range(3):
        config = {"kv_tokens": (512, 64)[seed % 2], "max_sequences": 5, "max_loras": 1 + seed, "lora_memory": 8}
        engine = adapted_engine(kind, cut_free=seed > 0, **config)
        chaos = Chaos(engine, contents, partial(random_request, kind), random.Random(f"{kind}{seed}"))
        for _ in range(150):
            chaos.act()
        answers, wrong = chaos.check(alone)
        assert not wrong
        asked += answers
        busy += chaos.busy
        evictions += engine.adapters.evictions
        preempted += engine.scheduler.preempted
    assert asked > 60
    assert min(busy, evictions) > 0
    assert preempted > 0 or kind == "diffusion"
