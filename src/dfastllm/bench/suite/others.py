"""Other OpenAI-compatible servers, for trials: each in an environment of its own, with demo-ar in the form it reads.

The suite itself never needs them; `python -m dfastllm.bench servers` measures them one after the other beside ours."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dfastllm.bench.cpu.environment import PEERS, Environment
from dfastllm.bench.suite.cells import NONE, Cell, Table, accuracy, named, number, text
from dfastllm.bench.suite.launch import Started, started_process, started_server
from dfastllm.bench.suite.schema import Latency, Results
from dfastllm.errors import GenerationError, ValidationError

__all__ = ["MODEL", "OTHERS", "SERVERS", "OtherServer", "across_servers", "other_server", "running_server"]

MODEL = "demo-ar"
OURS = "dfastllm"

TRANSFORMERS = Environment(
    "transformers",
    # torch first and exactly, or a CUDA one comes; requests is imported by the command and missing in its extra.
    (("torch==2.13.0",), ("transformers[serving]>=5.16.1,<5.20", "requests")),
    "import torch, transformers.cli.transformers",
)


@dataclass(frozen=True, slots=True)
class OtherServer:
    """command: (interpreter, model file or directory, port, threads) to arguments. ready: the path that answers 200.
    variables: (interpreter, threads) to what is added to the environment."""

    name: str
    environment: Environment
    model: Callable[[Path], Path]
    command: Callable[[Path, Path, int, int], Sequence[str]]
    ready: str
    variables: Callable[[Path, int], Mapping[str, str]]


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


def vllm_serve(python: Path, model: Path, port: int, threads: int) -> list[str]:
    del threads  # VLLM_CPU_OMP_THREADS_BIND
    command = [str(python.parent / "vllm"), "serve", str(model), "--served-model-name", model.name]
    command += ["--dtype", "bfloat16", "--max-model-len", "512", "--max-num-seqs", "16"]
    return [*command, "--no-enable-prefix-caching", "--host", "127.0.0.1", "--port", str(port)]


def vllm_variables(python: Path, threads: int) -> Mapping[str, str]:
    """The cores that we use too: its own choice leaves one of them free for its front. Its documentation advises to
    load Intel's OpenMP first."""
    return {
        "LD_PRELOAD": str(python.parent.parent / "lib" / "libiomp5.so"),
        "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def nothing(_: Path, __: int) -> Mapping[str, str]:
    return {}


def offline(_: Path, __: int) -> Mapping[str, str]:
    return {"HF_HUB_OFFLINE": "1"}


OTHERS: Mapping[str, OtherServer] = {
    server.name: server
    for server in (
        OtherServer("llama-cpp-python", PEERS["llama.cpp"], as_gguf, llama_cpp_python, "/v1/models", nothing),
        OtherServer("transformers", TRANSFORMERS, shipped, transformers_serve, "/health", offline),
        OtherServer("vllm", PEERS["vllm"], shipped, vllm_serve, "/health", vllm_variables),
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
    if name == OURS:
        with started_server(["--model", MODEL, "--threads", str(threads)], log) as started:
            yield started.url
        return
    with other_server(OTHERS[name], OTHERS[name].model(cache.absolute()), cache, log, threads) as started:
        yield started.url


@contextmanager
def other_server(server: OtherServer, model: Path, cache: Path, log: Path, threads: int) -> Iterator[Started]:
    """Start a server of others on a free port with any model that it reads, called by the name of its file or
    directory. Raises GenerationError when it does not come up; its output is in `log`."""
    python = server.environment.ensure(cache).absolute()
    port = _free_port()
    with started_process(
        server.command(python, model, port, threads),
        log,
        environment={"OMP_NUM_THREADS": str(threads), **server.variables(python, threads)},
        folder=model.parent,
        url=f"http://127.0.0.1:{port}",
        ready=server.ready,
    ) as started:
        yield started


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


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
    line = "One after the other, each as its user meets it; ours, transformers and vLLM in bfloat16, llama.cpp in Q8_0."
    return Table("servers_compared", "The same model under several servers", columns, tuple(rows), (line,))
