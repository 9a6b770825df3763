"""The triton runner on a card: formats that its interpreter gets wrong, graphs, bits, demo models and a server. Skipped
where there is no card; `scripts/gpu-check --part tests` runs it where there is one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from typing import Any

import pytest
import torch

from dfastllm import assemble
from dfastllm.core import SamplingParams
from dfastllm.engine import Engine, EngineConfig
from dfastllm.engine.batch import pack
from dfastllm.engine.pages import Pages
from dfastllm.engine.runners.torch import TorchRunner
from dfastllm.engine.runners.triton import TritonRunner
from dfastllm.models import DeviceDecoder, tiny
from tests.engine.runners.test_native import WIDE, Sequence
from tests.engine.test_invariance import answers, requests

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card")]
CUDA = torch.device("cuda")


def many(count: int) -> list[Sequence]:
    pool = Pages(96, 16)
    return [Sequence(pool, seed, 160) for seed in range(count)]


def runner_of(model: DeviceDecoder, kv: torch.dtype | None = None, **more: Any) -> TritonRunner:
    return TritonRunner(model, 96 * 16, kv or model.dtype, 16, **{"max_rows": 256, "max_spans": 32, **more})


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "llada", "sdar", "llada2_moe"])
@pytest.mark.parametrize(
    ("dtype", "weights", "kv"),
    [
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float16, None, torch.float16),
        (torch.bfloat16, "fp8", torch.bfloat16),
        (torch.bfloat16, None, torch.float8_e4m3fn),
        (torch.bfloat16, "w8", torch.int8),
    ],
)
def test_formats_stay_close_to_float32(family: str, dtype: torch.dtype, weights: str | None, kv: torch.dtype) -> None:
    model = tiny(family, seed=5, **WIDE)
    plain = TorchRunner(model, 96 * 16, torch.float32, "cpu", min_rows=16)
    fast = runner_of(assemble.place(model.to(dtype), weights, device=CUDA), kv)
    model = model.float()
    sequences = many(3)
    for step in (0, 1, 2, 5):
        laid = pack([s.item(step) for s in sequences])
        wanted, got = plain.run(laid).logits(), fast.run(laid).logits().cpu()
        assert torch.nn.functional.cosine_similarity(got, wanted, dim=-1).median() > 0.97


def test_every_bucket_has_a_graph() -> None:
    fast = runner_of(assemble.place(tiny("llada", seed=5, **WIDE).bfloat16(), device=CUDA))
    assert fast.graphs is not None
    assert not fast.graphs.failed
    assert len(fast.graphs) == len(list(fast.buckets)) + len(fast.buckets.sizes)
    for step in (0, 2, 6):
        fast.run(pack([s.item(step) for s in many(3)])).stats(norm=True, spread=True)
    assert fast.counts == {"graph": 3}


@pytest.mark.parametrize("weights", ["w8", None])
def test_bits_of_a_row_do_not_depend_on_neighbours(weights: str | None) -> None:
    model = assemble.place(tiny("llada", seed=6, **WIDE).bfloat16(), weights, device=CUDA, invariant=True)

    def run(seeds: list[int]) -> list[list[torch.Tensor]]:
        pool = Pages(96, 16)
        sequences = [Sequence(pool, seed, 160) for seed in seeds]
        runner, out = runner_of(model), []
        for step in range(len(sequences[0].todo)):
            items = [s.item(step) for s in sequences]
            logits = runner.run(pack(items)).logits().cpu()
            out.append(list(logits.split([len(item[0].want) for item in items])))
        return out

    alone = run([1])
    for seeds in ([1, 2, 3, 4], [4, 3, 1], [1]):
        for one, together in zip(alone, run(seeds), strict=True):
            assert torch.equal(one[0], together[seeds.index(1)])


@pytest.mark.parametrize("family", ["llama", "llada", "sdar"])
def test_same_answers_alone_and_together(family: str) -> None:
    """Tokens and the bits of every logprob, of all policies, greedy and drawn."""
    model = assemble.place(tiny(family, seed=5, **WIDE).bfloat16(), device=CUDA, invariant=True)
    config = EngineConfig(max_batch_rows=256, prefill_chunk=16, kv_tokens=2048)

    def engine() -> Engine:
        return Engine(model, config=config, device=CUDA)

    together = engine()
    for request in requests(model.info.kind):
        together.add(request)
    batch = answers(together)
    for request in list(requests(model.info.kind))[:6]:
        alone = engine()
        alone.add(request)
        assert batch[request.request_id] == answers(alone)[request.request_id]


@pytest.mark.parametrize("name", ["demo-ar", "demo-diffusion", "demo-block"])
def test_demo_models_answer_as_the_torch_runner_does(name: str) -> None:
    from dfastllm.llm import LLM

    texts = []
    for backend in ("triton", "torch"):
        llm = LLM(name, device="cuda", dtype="float32", backend=backend)  # type: ignore[arg-type]
        try:
            found = llm.generate(["12 + 30 =", "the days of the week"], SamplingParams(temperature=0, max_tokens=24))
            texts.append([one.text for one in found])
        finally:
            llm.close()
    assert texts[0] == texts[1]
    assert any(texts[0])


def test_a_server_answers() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = "from dfastllm.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", "--model", "demo-ar", "--device", "cuda", "--port", str(port)]
    server = subprocess.Popen(command, env={**os.environ}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    base = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 150
        while True:
            try:
                urllib.request.urlopen(f"{base}/health/ready", timeout=2)
                break
            except (urllib.error.URLError, OSError):
                assert server.poll() is None, "the server ended"
                assert time.monotonic() < end, "the server was not ready"
                time.sleep(0.5)
        body = json.dumps({"model": "demo-ar", "prompt": "12 + 30 =", "max_tokens": 8, "temperature": 0}).encode()
        asked = urllib.request.Request(f"{base}/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked, timeout=30) as answer:
            assert json.load(answer)["choices"][0]["text"]
    finally:
        server.terminate()
        server.wait(20)
