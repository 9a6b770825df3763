"""Other OpenAI-compatible servers, for trials: each in an environment of its own, with demo-ar in the form it reads.

The suite itself never needs them; `python -m dfastllm.bench servers` measures them one after the other beside ours."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2

from dfastllm.bench.cpu.environment import PEERS, Environment
from dfastllm.bench.suite.cells import NONE, Cell, Table, accuracy, named, number, text
from dfastllm.bench.suite.launch import started_server
from dfastllm.bench.suite.schema import Latency, Results
from dfastllm.errors import GenerationError, ValidationError

__all__ = ["MODEL", "OTHERS", "SERVERS", "OtherServer", "across_servers", "running_server"]

MODEL = "demo-ar"
OURS = "dfastllm"
LOADING = 180.0  # s; transformers imports for some seconds

TRANSFORMERS = Environment(
    "transformers",
    # torch first and exactly, or a CUDA one comes; requests is imported by the command and missing in its extra.
    (("torch==2.13.0",), ("transformers[serving]>=5.16.1,<5.20", "requests")),
    "import torch, transformers.cli.transformers",
)


@dataclass(frozen=True, slots=True)
class OtherServer:
    """command: (interpreter, model file or directory, port, threads) to arguments. ready: the path that answers 200."""

    name: str
    environment: Environment
    model: Callable[[Path], Path]
    command: Callable[[Path, Path, int, int], Sequence[str]]
    ready: str
    variables: Mapping[str, str]


def shipped(_: Path) -> Path:
    import dfastllm

    return Path(dfastllm.__file__).parent / "shipped" / MODEL


def as_gguf(cache: Path) -> Path:
    """demo-ar as GGUF Q8_0, written by `dfastllm quantize` where it is missing."""
    path = cache / "models" / f"{MODEL}-q8_0.gguf"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part.gguf")
        part.unlink(missing_ok=True)
        run = [sys.executable, "-c", "from dfastllm.cli import main; main()", "quantize", MODEL]
        done = subprocess.run([*run, "--format", "gguf-q8_0", "--out", str(part)], capture_output=True, text=True)
        if done.returncode:
            raise GenerationError(f"{MODEL} could not be written as GGUF: {done.stderr.strip()[-500:]}")
        part.replace(path)
    return path


def llama_cpp_python(python: Path, model: Path, port: int, threads: int) -> list[str]:
    # Without interrupt_requests false a new request ends the one that runs.
    options = {"model": model, "model_alias": MODEL, "host": "127.0.0.1", "port": port, "n_ctx": 512}
    options |= {"n_threads": threads, "n_threads_batch": threads, "interrupt_requests": "false", "verbose": "false"}
    return [str(python), "-m", "llama_cpp.server", *(w for k, v in options.items() for w in (f"--{k}", str(v)))]


def transformers_serve(python: Path, model: Path, port: int, threads: int) -> list[str]:
    # By the directory's name, from within the one above: the name is the model's in every request and record.
    del threads  # OMP_NUM_THREADS
    command = [str(python.parent / "transformers"), "serve", model.name, "--host", "127.0.0.1", "--port", str(port)]
    return [*command, "--device", "cpu", "--log-level", "warning"]


OTHERS: Mapping[str, OtherServer] = {
    server.name: server
    for server in (
        OtherServer("llama-cpp-python", PEERS["llama.cpp"], as_gguf, llama_cpp_python, "/v1/models", {}),
        OtherServer("transformers", TRANSFORMERS, shipped, transformers_serve, "/health", {"HF_HUB_OFFLINE": "1"}),
    )
}
SERVERS = (OURS, *OTHERS)


@contextmanager
def running_server(name: str, cache: Path, log: Path, threads: int) -> Iterator[str]:
    """Start a server of `SERVERS` with demo-ar on a free port; its root URL once it is ready. Makes its environment
    under `cache` where that is missing. Raises ValidationError for another name, GenerationError when it does not come
    up; its output is in `log`."""
    if name not in SERVERS:
        raise ValidationError(f"there is no server {name!r}; there are {', '.join(SERVERS)}.", param="only")
    log.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        if name == OURS:
            arguments = ["--model", MODEL, "--threads", str(threads)]
            yield stack.enter_context(started_server(arguments, log))
            return
        server = OTHERS[name]
        python = server.environment.ensure(cache).absolute()
        model = server.model(cache.absolute())
        port = _free_port()
        process = subprocess.Popen(
            server.command(python, model, port, threads),
            cwd=model.parent,
            stdin=subprocess.DEVNULL,
            stdout=stack.enter_context(log.open("wb")),
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), **server.variables},
            start_new_session=True,
        )
        stack.callback(_stop, process)
        url = f"http://127.0.0.1:{port}"
        _wait(process, url + server.ready, log)
        yield url


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + LOADING
    while time.monotonic() < deadline:
        if process.poll() is not None:
            tail = log.read_bytes()[-500:].decode(errors="replace").strip()
            raise GenerationError(f"The server ended with code {process.returncode}; {log} ends with: {tail}")
        try:
            if httpx2.get(url, timeout=2.0, trust_env=False).status_code == 200:
                return
        except httpx2.HTTPError:
            pass  # not listening yet
        time.sleep(0.2)
    raise GenerationError(f"The server is not ready after {LOADING:g} s; see {log}.")


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def across_servers(found: Mapping[str, Results]) -> Table:
    """The baselines of several servers side by side. They were not measured in turns, and do not hold the same bits."""

    def at(latency: Latency | None) -> Cell:
        return Cell(NONE) if latency is None else number(latency.p50)

    rows = []
    for name, results in found.items():
        base = results.baseline
        if base is None or base.figures is None:
            rows.append((text(name), *[Cell(NONE)] * 5, Cell(results.partial_reason or "not measured", tone="bad")))
            continue
        speed = base.figures.speed
        rate = number(speed.output_throughput)
        times = [at(latency) for latency in (speed.ttft, speed.tpot, speed.e2el)]
        right = base.figures.accuracy
        rows.append(
            (
                text(name),
                rate,
                *times,
                Cell(accuracy(right), right.value if right else None),
                number(speed.errors, tone="bad" if speed.errors else ""),
            )
        )
    columns = named("Server", "Tok/s|TTFT p50, ms|TPOT p50, ms|E2E p50, ms|Accuracy|Errors")
    line = "One after the other, each as its user meets it; ours and transformers in bfloat16, llama.cpp in Q8_0."
    return Table("servers_compared", "The same model under several servers", columns, tuple(rows), (line,))
