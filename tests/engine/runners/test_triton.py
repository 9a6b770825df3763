"""The triton runner: the answers of the plain torch model and of the native runner, by its twins and by its kernels;
and what goes to the device and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from dfastllm import assemble
from dfastllm.core import Span
from dfastllm.engine import Engine, EngineConfig
from dfastllm.engine.batch import pack
from dfastllm.engine.pages import Pages, PageTable
from dfastllm.engine.runners.graphs import Graphs, row_counts
from dfastllm.engine.runners.native import NativeRunner
from dfastllm.engine.runners.torch import TorchRunner
from dfastllm.engine.runners.triton import TritonRunner
from dfastllm.errors import ModelLoadError, UnsupportedError, ValidationError
from dfastllm.kernels import set_threads
from dfastllm.kernels.rows import DenseRows
from dfastllm.kernels.token_set import TokenSet
from dfastllm.models import tiny
from dfastllm.models.device_random import random_decoder
from tests.engine.runners.test_native import WIDE, Sequence
from tests.engine.test_invariance import answers, requests
from tests.kit.device import DEVICE, KINDS, NO_TRITON, ops_of, placed, runner_of

FAMILIES = ("llama", "qwen3", "gemma2", "llada", "sdar", "llada2_moe")
needs_triton = pytest.mark.skipif(NO_TRITON is not None, reason=str(NO_TRITON))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    yield
    set_threads(1)


def many(pool: Pages, count: int) -> list[Sequence]:
    return [Sequence(pool, seed, 160) for seed in range(count)]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_every_kind_of_span_equal_the_plain_models(family: str) -> None:
    model = tiny(family, seed=5, **WIDE)
    sequences = many(Pages(64, 16), 3)
    plain = TorchRunner(model, 64 * 16, torch.float32, "cpu", min_rows=16)
    fast = runner_of(model, "twins" if DEVICE.type == "cpu" else "kernels", 64 * 16)
    for step in range(len(sequences[0].todo)):
        laid = pack([s.item(step) for s in sequences])
        wanted, got = plain.run(laid).logits(), fast.run(laid).logits()
        torch.testing.assert_close(got.cpu(), wanted, rtol=2e-4, atol=2e-4)
    assert set(fast.counts) <= {"bucket", "graph", "eager"}
    assert fast.counts["bucket"] + fast.counts["graph"] > 0


@needs_triton
def test_the_kernels_give_the_logits_of_the_plain_model() -> None:
    """Chunks, a canvas over a cache, shadows with their mask: on one layer, for the interpreter is slow."""
    model = tiny("llada", seed=5, **WIDE, layers=1)
    sequences = many(Pages(64, 16), 1)
    plain = TorchRunner(model, 64 * 16, torch.float32, "cpu", min_rows=16)
    fast = runner_of(model, "kernels", 64 * 16, max_rows=1)
    for step in (0, 2, 5):
        laid = pack([s.item(step) for s in sequences])
        torch.testing.assert_close(fast.run(laid).logits().cpu(), plain.run(laid).logits(), rtol=2e-4, atol=2e-4)


@needs_triton
@pytest.mark.parametrize("weights", ["w8", "w8r", "w8g", "w6", "w4m", "w4"])
def test_quantised_weights_give_the_numbers_of_the_cpu(weights: str) -> None:
    """But where a last bit moves an input to the next code."""
    model = tiny("llada", seed=6, **WIDE)
    sequences = many(Pages(64, 16), 2)
    native = NativeRunner(assemble.pack(model, weights), 64 * 16, torch.float32, 16)
    fast = runner_of(model, "twins", 64 * 16, weights)
    for step in (0, 1, 2, 5):
        laid = pack([s.item(step) for s in sequences])
        wanted, got = native.run(laid).logits(), fast.run(laid).logits().cpu()
        apart = (got - wanted).norm(dim=-1) / wanted.norm(dim=-1)
        assert float(apart.median()) < 1e-3, step
        assert float(apart.max()) < 0.05, step


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_are_those_of_the_logits(kind: str) -> None:
    model = tiny("llada", seed=6, **WIDE, layers=1)
    runner = runner_of(model, "twins", 64 * 16)
    rows = runner.run(pack([s.item(1) for s in many(Pages(64, 16), 3)]))
    wanted = DenseRows(rows.select(range(len(rows))).logits().cpu().clone())
    barred = [TokenSet(range(9 * i % 60, 9 * i % 60 + 90), 160) if i % 3 else None for i in range(len(rows))]
    runner.ops = ops_of(kind)
    for top in (0, 1, 5):
        asked: dict[str, Any] = {"ban": (7, 100), "barred": barred, "norm": True, "spread": True, "top": top}
        got, plain = rows.stats(**asked), wanted.stats(**asked)
        for name in ("token", "finite", "ids"):
            assert getattr(got, name).tolist() == getattr(plain, name).tolist(), name
        for name in ("best", "norm", "entropy", "margin", "logits"):
            np.testing.assert_allclose(getattr(got, name), getattr(plain, name), rtol=2e-4, atol=1e-5, err_msg=name)
    part = rows.select([1, 3]).stats(norm=True)
    assert part.token.tolist() == rows.stats().token[[1, 3]].tolist()


@pytest.mark.parametrize("family", ["llama", "llada", "sdar"])
def test_an_engine_gives_the_answers_of_the_torch_runner(family: str) -> None:
    """Mixed requests of all policies, greedy and drawn: with the same weights in float32 the same tokens."""
    model = tiny(family, seed=5, **WIDE)
    config = EngineConfig(max_batch_rows=96, prefill_chunk=16, kv_tokens=2048)
    found = []
    for made in (model, placed(model)):
        engine = Engine(made, config=config)
        if isinstance(engine.runner, TritonRunner):
            engine.runner.ops = ops_of("twins")
        for request in requests(engine.info.kind):
            engine.add(request)
        found.append({name: answer[0] for name, answer in answers(engine).items()})
    assert found[0] == found[1]


def test_rows_stay_what_they_are_when_the_next_step_runs() -> None:
    model = tiny("llada", seed=6, **WIDE)
    runner = runner_of(model, "twins", 64 * 16)
    sequences = many(Pages(64, 16), 2)
    first = runner.run(pack([s.item(0) for s in sequences]))
    token = first.select([0]).stats().token.tolist()
    later = first.select([0])
    runner.run(pack([s.item(1) for s in sequences]))
    assert later.stats().token.tolist() == token


def test_a_bucket_gives_what_the_exact_layout_gives() -> None:
    model = tiny("sdar", seed=6, **WIDE)
    sequences = many(Pages(64, 16), 3)
    padded, exact = runner_of(model, "twins", 1024), runner_of(model, "twins", 1024, max_rows=1)
    for step in range(len(sequences[0].todo)):
        laid = pack([s.item(step) for s in sequences])
        torch.testing.assert_close(padded.run(laid).logits(), exact.run(laid).logits(), rtol=1e-5, atol=1e-5)
    assert exact.counts["eager"] == len(sequences[0].todo)
    assert padded.counts["bucket"] + padded.counts["graph"] > 5


class Replayed:
    """What a captured graph is here: the work, run again."""

    def __init__(self, work: Any) -> None:
        self.replay = work


def test_captured_work_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """All buckets, and the statistics of as many rows, before the first step, which launches nothing else."""
    captured = []

    def record(graphs: Graphs, work: Any) -> Replayed:
        work()
        captured.append(work)
        return Replayed(work)

    monkeypatch.setattr(Graphs, "_recorded", record)
    model = tiny("llada", seed=6, **WIDE)
    runner = runner_of(model, "twins", 1024, graphs=True, max_rows=64)
    assert len(captured) == len(list(runner.buckets)) + len(runner.buckets.sizes)
    plain = runner_of(model, "twins", 1024)
    sequences = many(Pages(64, 16), 2)
    for number, step in enumerate((0, 2, 6)):
        laid = pack([s.item(step) for s in sequences])
        for ban in ((), (7,), (8, 9)):
            rows, wanted = runner.run(laid), plain.run(laid)
            got, expected = (some.stats(ban=ban, norm=True, spread=True) for some in (rows, wanted))
            assert got.token.tolist() == expected.token.tolist()
            np.testing.assert_allclose(got.norm, expected.norm, rtol=1e-5)
        assert runner.counts["graph"] + runner.counts["eager"] == 3 * (number + 1)
    assert runner.counts["graph"] >= 6
    assert not runner.counts["bucket"]


def test_what_cannot_be_captured_runs_without_a_graph(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(graphs: Graphs, work: Any) -> Replayed:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(Graphs, "_recorded", refuse)
    runner = runner_of(tiny("llada", seed=6, **WIDE), "twins", 1024, graphs=True, max_rows=4)
    assert "operation not permitted" in caplog.text
    table = PageTable(Pages(4, 16))
    table.grow(3)
    rows = runner.run(pack([(Span(0, (5, 9, 3), "causal", "keep", want=(2,)), table, 0)]))
    assert len(rows.stats().token) == 1
    assert runner.counts == {"bucket": 1}
    assert runner.graphs is not None
    assert set(runner.graphs.failed.values()) == {"operation not permitted when stream is capturing"}


def test_memory_that_runs_out_while_capturing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(graphs: Graphs, work: Any) -> Replayed:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Graphs, "_recorded", full)
    with pytest.raises(ModelLoadError, match="while capturing graphs: CUDA out of memory") as caught:
        runner_of(tiny("llada", seed=6, **WIDE), "twins", 1024, graphs=True)
    assert "Lower gpu_memory_utilization" in str(caught.value.hint)


class Transfers:
    """Counts what goes between host and device: every way that torch has."""

    WAYS = ("cpu", "item", "tolist", "numpy", "__bool__", "__int__", "__float__", "nonzero")

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: Counter[str] = Counter()
        for way in self.WAYS:
            monkeypatch.setattr(torch.Tensor, way, self._counted(way, getattr(torch.Tensor, way)))

    def _counted(self, way: str, real: Any) -> Any:
        def counted(tensor: torch.Tensor, *args: Any, **more: Any) -> Any:
            self.seen[way] += 1
            return real(tensor, *args, **more)

        return counted


@needs_triton
def test_a_step_waits_for_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the host looks at: the statistics, in one copy. (numpy() of the pinned buffer that a step is laid into, and
    of the copy, wait for nothing.)"""
    runner = runner_of(tiny("llada", seed=6, **WIDE), "kernels", 64 * 16)
    if not runner.ops.captured:
        pytest.skip("some ops still have their twins, which look at values")
    step = pack([s.item(2) for s in many(Pages(64, 16), 2)])
    runner.run(step).stats(norm=True, spread=True)  # what is made once
    transfers = Transfers(monkeypatch)
    rows = runner.run(step)
    assert transfers.seen.total() == transfers.seen["numpy"] == 1
    rows.stats(norm=True, spread=True)
    assert transfers.seen["cpu"] == 1
    assert transfers.seen.total() == transfers.seen["cpu"] + transfers.seen["numpy"]


def test_what_it_cannot_run_is_named() -> None:
    model = tiny("llama", seed=5, **WIDE)
    with pytest.raises(UnsupportedError, match="multiple of 16"):
        TritonRunner(placed(model), 64, torch.float32, 8)
    with pytest.raises(UnsupportedError, match="float64"):
        TritonRunner(placed(model), 64, torch.float64, 16)
    runner, table = runner_of(model, "twins", 64), PageTable(Pages(4, 16))
    table.grow(3)
    with pytest.raises(ValidationError, match="the step has id 160; this model has 160 embedding rows"):
        runner.run(pack([(Span(0, (5, 9, 160), "causal", "keep", want=(2,)), table, 0)]))


@pytest.mark.parametrize("weights", [None, "w8", "w8g", "w6", "w4", "w4m", "w4r", "fp8"])
def test_random_weights_are_made_on_the_device(weights: str | None) -> None:
    """The same for the same seed, of the format asked for, and finite."""
    model = tiny("llada", seed=6, **WIDE)

    def logits(seed: int) -> torch.Tensor:
        made = random_decoder(model.config, model.info, DEVICE, torch.float32, quantization=weights, seed=seed)
        assert {"w4r": "w8", "w6": "w6g", "w4": "w4g", "w4m": "w4g", None: "f32"}.get(weights, weights) in made.formats
        assert made.invariant == (weights not in (None, "fp8"))
        runner = TritonRunner(made, 1024, torch.float32, 16, max_rows=64, ops=ops_of("twins"))
        return runner.run(pack([s.item(2) for s in many(Pages(64, 16), 2)])).logits().cpu()

    first = logits(1)
    assert first.isfinite().all()
    assert first.std() > 0.05
    assert torch.equal(first, logits(1))
    assert not torch.equal(first, logits(2))


def test_sizes_of_buckets() -> None:
    assert row_counts(1) == [1]
    assert row_counts(300) == [1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384]
    assert row_counts(2048)[-1] == 2048
