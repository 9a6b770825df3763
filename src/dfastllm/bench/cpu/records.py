"""The records against peers: files made, both sides loaded, the cases measured in turns."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dfastllm import assemble
from dfastllm.bench.cpu.cases import CASES, Case
from dfastllm.bench.cpu.compare import Contest, Done, Pace, Row
from dfastllm.bench.cpu.environment import PEERS
from dfastllm.bench.cpu.ours import Ours
from dfastllm.bench.cpu.shapes import Shape
from dfastllm.bench.cpu.turns import peer_burst
from dfastllm.bench.cpu.weights import packed
from dfastllm.bench.cpu.wire import Peer
from dfastllm.models import Decoder, build

__all__ = ["PAIRS", "Plan", "against_llamacpp", "against_openvino", "against_torch", "ensure_gguf"]

SEED = 0
ARCHITECTURES = {"qwen2": "qwen2", "llada": "llama", "qwen3_moe": "qwen3moe"}  # of the files llama.cpp gets
# What a peer's format is measured against. OpenVINO's int8 has one scale a channel as w8 has, but is about as near to
# float on a real model as w8r and w8g are (`bench fidelity`, benchmarks/cpu/README.md): w8 is shown for what its speed
# costs.
PAIRS: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("openvino-genai", "int8"): ("w8r", "w8g", "w8"),
    ("openvino-genai", "int4"): ("w4r", "w4"),
}


@dataclass(frozen=True)
class Plan:
    """What a record measures and how. done: rows of an earlier, unfinished run of the same record."""

    shape: Shape
    formats: Sequence[str]
    cases: Sequence[Case]
    threads: int
    cache: Path
    pace: Pace
    done: Done = frozenset()

    def left(self, peer: str, form: str, own: str) -> list[Case]:
        """Cases of this peer's format against our `own` that are not done."""
        return [c for c in self.cases if (self.shape.name, peer, form, own, c.name) not in self.done]


@contextlib.contextmanager
def _worker(peer: str, module: str, cache: Path, threads: int) -> Iterator[Peer]:
    python = PEERS[peer].ensure(cache)
    with Peer(python, module, environment={"OMP_NUM_THREADS": str(threads)}) as worker:
        yield worker


def ensure_gguf(worker: Peer, shape: Shape, formats: Sequence[str], cache: Path, threads: int) -> dict[str, Path]:
    """Paths of random-weights GGUF files of the shape, made by llama.cpp's own quantiser where missing.

    A LLaDA shape is written as the Llama model of the same sizes: llama.cpp runs its `llada` architecture without any
    K,V cache, so a block on a cache can only be asked of the other."""
    directory = cache / "models" / f"gguf-{shape.name}"
    published = shape.published() | {"architecture": ARCHITECTURES[shape.family]}
    worker.call("make", shape=published, directory=str(directory), formats=list(formats), seed=SEED, threads=threads)
    return {name: directory / f"{name}.gguf" for name in formats}


def against_llamacpp(plan: Plan, peer: str = "llama.cpp") -> Iterator[Row | dict[str, Any]]:
    """The same GGUF file and threads on both sides. Yields the peer's versions once, then a Row per format and case.
    peer: which build of it, a key of PEERS."""
    with _worker(peer, "llamacpp", plan.cache, plan.threads) as worker:
        files = ensure_gguf(worker, plan.shape, plan.formats, plan.cache, plan.threads)
        for form, path in files.items():
            cases = plan.left(peer, form, form)
            if not cases:
                continue
            yield worker.call("load", path=str(path), threads=plan.threads)
            ours = Ours(assemble.load(path).model, plan.threads)
            size = path.stat().st_size
            contest = Contest(plan.shape, peer, form, form, size, size, plan.pace)
            for case in cases:
                yield contest.run(case, ours, peer_burst(worker, case), [worker.pid])
            del ours
            gc.collect()


def against_openvino(plan: Plan) -> Iterator[Row | dict[str, Any]]:
    """The same shape on both sides: int8 against w8r, w8g and w8, int4 (groups of 128) against w4r and w4 (groups of
    32); head and embedding of 8 bits on both sides."""
    config, info = plan.shape.own()
    with _worker("openvino-genai", "openvino_genai", plan.cache, plan.threads) as worker:
        directory = plan.cache / "models" / f"openvino-{plan.shape.name}"
        sizes = worker.call(
            "make", shape=plan.shape.published(), directory=str(directory), formats=list(plan.formats), seed=SEED
        )
        for form in plan.formats:
            for own in PAIRS["openvino-genai", form]:
                cases = plan.left("openvino-genai", form, own)
                if not cases:
                    continue
                yield worker.call("load", directory=str(directory / form), threads=plan.threads)
                model = packed(build(config, info, seed=SEED, dtype=torch.bfloat16), own)
                contest = Contest(plan.shape, "openvino-genai", form, own, model.nbytes, sizes[form], plan.pace)
                ours = Ours(model, plan.threads)
                for case in cases:
                    yield contest.run(case, ours, peer_burst(worker, case), [worker.pid])
                del ours, model
                gc.collect()


def against_torch(plan: Plan) -> Iterator[Row | dict[str, Any]]:
    """The plain torch decoder in bfloat16 under the same runner protocol, in this process; formats are ours."""
    config, info = plan.shape.own()
    plain: Decoder = build(config, info, seed=SEED, dtype=torch.bfloat16)
    theirs = Ours(plain, plan.threads, "pytorch")
    yield {"torch": torch.__version__}
    peer_bytes = sum(p.nbytes for p in plain.parameters())
    for own in plan.formats:
        cases = plan.left("pytorch", own, own)
        if not cases:
            continue
        model = packed(plain, own)
        contest = Contest(plan.shape, "pytorch", own, own, model.nbytes, peer_bytes, plan.pace)
        ours = Ours(model, plan.threads)
        for case in cases:
            yield contest.run(case, ours, partial(theirs.measure, case, answer="logits"), [])
        del ours, model
        gc.collect()


def named_cases(names: Sequence[str] | None) -> list[Case]:
    """Cases by the beginnings of their names; None: all."""
    return [case for case in CASES.values() if names is None or any(case.name.startswith(name) for name in names)]
