"""Modules turn text into text and do nothing else: no imports, no more fuel, memory, time or text than allowed."""

from __future__ import annotations

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dfastllm.errors import SandboxError, UnsupportedError, ValidationError
from dfastllm.sandbox import Limits, Module

pytest.importorskip("wasmtime", reason="wasmtime is not installed")

EXAMPLE = Path(__file__).parents[2] / "examples" / "pipelines" / "redact.yaml"
ALLOC = '(func (export "alloc") (param i32) (result i32) (i32.const 1024))'
MEMORY = '(memory (export "memory") 1)'
SAME = "(i64.or (i64.shl (i64.extend_i32_u (local.get 0)) (i64.const 32)) (i64.extend_i32_u (local.get 1)))"


def module(body: str, more: str = "", memory: str = MEMORY, **limits: float) -> Module:
    run = f'(func (export "run") (param i32 i32) (result i64) {body})'
    return Module(f"(module {memory} {more} {ALLOC} {run})", Limits(**limits), name="mod")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def digits() -> Module:
    return Module(yaml.safe_load(EXAMPLE.read_text())["modules"]["digits"]["wat"], name="digits")


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=200))
def test_the_example_blacks_out_digits_and_nothing_else(digits: Module, text: str) -> None:
    clean = text.encode("utf-8", "replace").decode()
    wanted = "".join("X" if char in "0123456789" else char for char in clean)
    assert digits.run(text) == wanted


def test_a_text_larger_than_the_memory_it_began_with(digits: Module) -> None:
    assert digits.run("7" * 300_000) == "X" * 300_000


def test_runs_share_nothing() -> None:
    counts = module(
        f"(global.set $n (i32.add (global.get $n) (i32.const 1))) (i32.store8 (local.get 0) (i32.add (i32.const 48) "
        f"(global.get $n))) {SAME}",
        more="(global $n (mut i32) (i32.const 0))",
    )
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(counts.run, ["0"] * 40)) == {"1"}


@pytest.mark.parametrize(
    ("body", "limits", "said"),
    [
        ("(loop $l (br $l)) (i64.const 0)", {"fuel": 100_000}, "mod ran for more than 100000 instructions"),
        ("(loop $l (br $l)) (i64.const 0)", {"fuel": 10**15, "seconds": 0.05}, "mod ran for more than 0.05 s"),
        ("unreachable", {}, "mod failed: wasm `unreachable` instruction executed"),
        ("(i64.extend_i32_u (i32.load (i32.const 70000)))", {}, "mod failed: out of bounds memory access"),
        ("(i64.div_u (i64.const 1) (i64.const 0))", {}, "mod failed: integer divide by zero"),
        ("(call $deep) (i64.const 0)", {}, "mod failed: call stack exhausted"),
        ("(i64.const 0xffffffff00000010)", {}, "run points at 16 bytes from 4294967295 on; its memory has 65536"),
        ("(i64.const 0x0000000000000041)", {"text": 64}, "mod gave 65 bytes; it may give 64"),
        ("(i32.store8 (i32.const 9) (i32.const 255)) (i64.const 0x0000000900000001)", {}, "bytes that are not UTF-8"),
    ],
)
def test_what_a_module_may_not(body: str, limits: dict[str, float], said: str) -> None:
    bad = module(body, more="(func $deep (call $deep))", **limits)
    began = time.monotonic()
    with pytest.raises(SandboxError, match=said.replace("(", r"\(")) as refused:
        bad.run("text")
    assert time.monotonic() - began < 5
    assert refused.value.status == 400


def test_memory_does_not_grow_beyond_its_limit() -> None:
    """memory.grow says -1, as WebAssembly has it; a module that begins with more is refused."""
    grows = module(f"(i32.store8 (local.get 0) (i32.add (i32.const 49) (memory.grow (i32.const 400)))) {SAME}")
    assert grows.run("?") == "0"
    with pytest.raises(SandboxError, match="wants more than 16777216 bytes of memory"):
        module("(i64.const 0)", memory='(memory (export "memory") 300)').run("x")


def test_a_module_that_fails_leaves_others_alone(digits: Module) -> None:
    loops = module("(loop $l (br $l)) (i64.const 0)", fuel=10**15, seconds=0.2)
    failed = threading.Event()

    def loop() -> None:
        with pytest.raises(SandboxError):
            loops.run("x")
        failed.set()

    thread = threading.Thread(target=loop)
    thread.start()
    while not failed.is_set():
        assert digits.run("a1") == "aX"
    thread.join()
    assert digits.run("a1") == "aX"
    deadline = time.monotonic() + 5
    while any(one.name == "dfastllm-wasm" for one in threading.enumerate()):
        assert time.monotonic() < deadline, "the clock of runs goes on without one"
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("(module", "is no WebAssembly module: expected `\\)`"),
        (b"\x00asm\x01\x00\x00\x00\xff", "is no WebAssembly module"),
        (b"not wasm", "is no WebAssembly module"),
        ("(module)", "must export alloc"),
        (f"(module {ALLOC})", "must export run"),
        (f'(module {ALLOC} (func (export "run") (param i32) (result i64) (i64.const 0)))', "must export run"),
        (
            f'(module {ALLOC} (func (export "run") (param i32 i32) (result i64) (i64.const 0)))',
            "must export its memory",
        ),
        ('(module (import "wasi_snapshot_preview1" "fd_write" (func)))', "imports wasi_snapshot_preview1.fd_write"),
        ('(module (import "env" "memory" (memory 1)))', "imports env.memory"),
        (f"(module (memory 1 1 shared) {ALLOC})", "is no WebAssembly module"),
    ],
)
def test_what_is_no_such_module(source: str | bytes, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Module(source)


def test_sizes() -> None:
    with pytest.raises(ValidationError, match="has 2001 bytes; a module may have 2000"):
        Module("x" * 2001, Limits(module=2000))
    with pytest.raises(ValidationError, match="has 5 bytes; it may have 4"):
        module(SAME, text=4).run("häll")
    for name, value in (("fuel", 0), ("memory", 0), ("module", 0), ("text", 0), ("seconds", 0.0)):
        with pytest.raises(ValidationError, match=name):
            Limits(**{name: value})  # type: ignore[arg-type]


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wasmtime", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'dfastllm\[sandbox\]'"):
        Module("(module)")
