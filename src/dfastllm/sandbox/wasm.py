"""WebAssembly modules that turn a text into a text.

A module exports three things and imports nothing:

| export | type | what |
|---|---|---|
| memory | memory | where both texts lie |
| alloc | (size: i32) -> i32 | where so many bytes may be written |
| run | (at: i32, size: i32) -> i64 | makes another text of the UTF-8 text there; gives its place in the upper, |
| | | its size in the lower 32 bits |

Each run has an instance of its own: nothing that one run leaves behind is seen by another. It ends when its fuel (about
an instruction each) or its time is spent, and cannot have more memory than its limit. Threads, and the parts of
WebAssembly whose cost fuel does not see well, are switched off.
"""

from __future__ import annotations

import atexit
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dfastllm.errors import SandboxError, UnsupportedError, ValidationError

if TYPE_CHECKING:
    import wasmtime

__all__ = ["Limits", "Module"]

TICK = 0.005  # s: how exactly a time limit is kept
PAGE = 65536  # bytes of a page of WebAssembly's memory
EXPORTS = ("memory", "alloc", "run")


@dataclass(frozen=True)
class Limits:
    """What a module may take.

    module  bytes of the module itself, before it is compiled.
    fuel    instructions of a run, about.
    memory  bytes of its memory.
    seconds of a run.
    text    bytes of the text that goes in, and of the one that comes out.

    Raises ValidationError for one below 1.
    """

    module: int = 1 << 18
    fuel: int = 200_000_000
    memory: int = 1 << 24
    seconds: float = 1.0
    text: int = 1 << 20

    def __post_init__(self) -> None:
        for name in ("module", "fuel", "memory", "text"):
            if getattr(self, name) < 1:
                raise ValidationError(f"{name} must be at least 1, got {getattr(self, name)}.", param=name)
        if not self.seconds > 0:
            raise ValidationError(f"seconds must be above 0, got {self.seconds}.", param="seconds")


class Module:
    """A compiled module. Thread-safe. `run` blocks its thread, for `limits.seconds` at most.

    source: WebAssembly's binary form, or its text form (WAT).

    Raises ValidationError for what is no such module, too large, or imports anything, UnsupportedError without the
    package that runs it."""

    def __init__(self, source: bytes | str, limits: Limits | None = None, *, name: str = "module") -> None:
        self.limits = limits or Limits()
        self.name = name
        wasm = _wasmtime()
        size = len(source.encode() if isinstance(source, str) else source)
        if size > self.limits.module:
            raise ValidationError(f"{name} has {size} bytes; a module may have {self.limits.module}.", param="modules")
        try:
            binary = bytes(wasm.wat2wasm(source)) if isinstance(source, str) else source
            self._module = wasm.Module(_engine(), binary)
        except (wasm.WasmtimeError, UnicodeError) as error:
            raise ValidationError(f"{name} is no WebAssembly module: {_first_line(error)}.", param="modules") from error
        self._check()

    def _check(self) -> None:
        imports = [f"{one.module}.{one.name}" for one in self._module.imports]
        if imports:
            raise ValidationError(
                f"{self.name} imports {imports[0]}; a module may import nothing.",
                param="modules",
                hint="Text in and text out is all that it gets: build it without WASI.",
            )
        wasm = _wasmtime()
        found = {one.name: one.type for one in self._module.exports}
        i32, i64 = wasm.ValType.i32(), wasm.ValType.i64()
        for name, params, results in (("alloc", [i32], [i32]), ("run", [i32, i32], [i64])):
            kind = found.get(name)
            if not isinstance(kind, wasm.FuncType) or (kind.params, kind.results) != (params, results):
                raise ValidationError(
                    f"{self.name} must export {name} as a function of {len(params)} i32 giving one "
                    f"{'i32' if name == 'alloc' else 'i64'}.",
                    param="modules",
                    hint=f"A module exports {', '.join(EXPORTS)}; docs/pipelines.md has one.",
                )
        if not isinstance(found.get("memory"), wasm.MemoryType):
            raise ValidationError(f"{self.name} must export its memory as 'memory'.", param="modules")

    def run(self, text: str) -> str:
        """What the module makes of a text. Raises SandboxError where it traps, spends its fuel or its time, wants more
        memory than it may have, or gives what is no text; ValidationError for a text that is too long."""
        given = text.encode("utf-8", "replace")
        if len(given) > self.limits.text:
            raise ValidationError(
                f"the text for {self.name} has {len(given)} bytes; it may have {self.limits.text}.", param="input"
            )
        wasm = _wasmtime()
        store = wasm.Store(_engine())
        store.set_limits(memory_size=self.limits.memory, instances=1, tables=4, memories=1, table_elements=10_000)
        store.set_fuel(self.limits.fuel)
        ticks = max(1, round(self.limits.seconds / TICK))
        with _ticking():
            store.set_epoch_deadline(ticks)
            began = time.monotonic()
            try:
                return self._run(store, given)
            except (wasm.WasmtimeError, wasm.Trap) as error:
                raise self._failure(error, store, time.monotonic() - began) from error

    def _run(self, store: wasmtime.Store, given: bytes) -> str:
        exports = _wasmtime().Instance(store, self._module, []).exports(store)
        memory: Any = exports["memory"]
        alloc: Any = exports["alloc"]
        run: Any = exports["run"]
        at = alloc(store, len(given)) & 0xFFFFFFFF
        self._inside(memory.data_len(store), at, len(given), "alloc")
        memory.write(store, given, at)
        packed = run(store, _signed(at), len(given)) & 0xFFFFFFFFFFFFFFFF
        place, size = packed >> 32, packed & 0xFFFFFFFF
        if size > self.limits.text:
            raise SandboxError(f"{self.name} gave {size} bytes; it may give {self.limits.text}.", param="modules")
        self._inside(memory.data_len(store), place, size, "run")
        try:
            return bytes(memory.read(store, place, place + size)).decode("utf-8")
        except UnicodeDecodeError as error:
            raise SandboxError(f"{self.name} gave bytes that are not UTF-8.", param="modules") from error

    def _inside(self, length: int, at: int, size: int, who: str) -> None:
        if at + size > length:
            raise SandboxError(
                f"{self.name}: {who} points at {size} bytes from {at} on; its memory has {length}.", param="modules"
            )

    def _failure(self, error: Exception, store: wasmtime.Store, seconds: float) -> SandboxError:
        said = str(error)
        if "all fuel consumed" in said:
            why = f"ran for more than {self.limits.fuel} instructions"
        elif "interrupt" in said or seconds >= self.limits.seconds:
            why = f"ran for more than {self.limits.seconds:g} s"
        elif "memory" in said and "limit" in said:
            why = f"wants more than {self.limits.memory} bytes of memory"
        else:
            why = f"failed: {_reason(said)}"
        return SandboxError(f"{self.name} {why}.", param="modules")


def _signed(value: int) -> int:
    """An unsigned 32-bit number as WebAssembly's i32 takes it."""
    return value - (1 << 32) if value >= 1 << 31 else value


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")[:200] if str(error).strip() else type(error).__name__


def _reason(said: str) -> str:
    """The trap itself, out of a report with a backtrace."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    found = next((line for line in lines if "wasm trap:" in line), lines[0] if lines else "no reason given")
    return found.rpartition("wasm trap:")[2].strip().rstrip(".")[:200]


def _wasmtime() -> Any:
    try:
        import wasmtime
    except ImportError as error:
        raise UnsupportedError(
            "WebAssembly modules need the package wasmtime, which is not installed.",
            param="modules",
            hint="Install it: pip install 'dfastllm[sandbox]'.",
        ) from error
    return wasmtime


_lock = threading.Lock()
_made: Any = None


def _engine() -> Any:
    """One for the process: it holds the compiler's settings and the clock of all runs."""
    global _made
    with _lock:
        if _made is None:
            wasm = _wasmtime()
            config = wasm.Config()
            config.consume_fuel = True
            config.epoch_interruption = True
            config.wasm_threads = False
            config.wasm_memory64 = False
            config.wasm_multi_memory = False
            config.max_wasm_stack = 1 << 19
            _made = wasm.Engine(config)
            atexit.register(_forget)
        return _made


def _forget() -> None:
    """At the end of the process, while wasmtime can still free what it holds."""
    global _made
    _made = None


class _Ticking:
    """Advances the engine's clock while anything runs; sleeps without a thread otherwise."""

    def __init__(self) -> None:
        self._count = 0
        self._guard = threading.Lock()
        self._stop = threading.Event()

    def __enter__(self) -> None:
        with self._guard:
            self._count += 1
            if self._count == 1:
                self._stop = threading.Event()
                threading.Thread(target=self._tick, args=(self._stop,), name="dfastllm-wasm", daemon=True).start()

    def __exit__(self, *_: object) -> None:
        with self._guard:
            self._count -= 1
            if self._count == 0:
                self._stop.set()

    @staticmethod
    def _tick(stop: threading.Event) -> None:
        engine = _engine()
        while not stop.wait(TICK):
            engine.increment_epoch()


_clock = _Ticking()


def _ticking() -> _Ticking:
    return _clock
