"""The parts of distillation for speed together, by the names of the distillation document: shapes, losses,
quantisation, speed metrics, and a training step with each loss. All on the real path: a shipped model, its tokenizer,
generated rows.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dfastllm.distill import (
    KDDataset,
    aggregate_speed_metrics,
    collate_kd_batch,
    combined_kd_loss,
    early_tool_call_loss,
    length_aware_kd_loss,
    sample_enumerated_shape,
    should_enable_qat,
    truncate_batch_to_shape,
)
from dfastllm.distill.data.collate import to_rows
from dfastllm.distill.data.generate import generate
from dfastllm.distill.forward import hidden_rows
from dfastllm.distill.probe import in_engine
from dfastllm.distill.run import load_student
from dfastllm.distill.work import DistillWork
from dfastllm.llm import resolve
from dfastllm.metrics.model_speed import measure_speed
from dfastllm.metrics.workload import speed_samples
from dfastllm.models.decoder import Decoder
from dfastllm.text import Tokenizer
from dfastllm.train.loop import Loop
from dfastllm.train.plan import Plan
from tests.kit import distilled

QUIET = {"use_length_aware_kd": False, "use_early_tool_call_loss": False}


@pytest.fixture(scope="module")
def student() -> tuple[Decoder, Tokenizer]:
    torch.set_num_threads(1)
    return load_student(resolve("demo-draft"))


@pytest.fixture(scope="module")
def batch(student: tuple[Decoder, Tokenizer], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Four rows of a generated set, on disk and back; some should call a tool."""
    path = tmp_path_factory.mktemp("data") / "kd_mix.jsonl"
    generate(path, 4, tasks=("tools", "arithmetic"))
    dataset = KDDataset(path, student[1])
    return collate_kd_batch([dataset[i] for i in range(4)], dataset.pad_id)


def test_shape_sampling_in_training_loop() -> None:
    """A run's micro-batches have the shapes that its steps draw, in their shares, the same after a resume."""
    raw = distilled.settings(quant={"enabled": False}, train={"grad_accum": 1}, speed=QUIET)
    config, work = distilled.made(raw, samples=16)
    stream = work.batches((0, 0, 0))
    found = [next(stream) for _ in range(12)]
    lengths, probs = config.train.seq_lengths, config.train.shape_probs
    for step, (one, _) in enumerate(found):
        assert one["input_ids"].shape[1] == sample_enumerated_shape(lengths, probs, step)
        assert one["labels"].shape == one["input_ids"].shape == one["attention_mask"].shape
    assert {one["input_ids"].shape[1] for one, _ in found} == set(lengths)
    again = work.batches(found[5][1])
    assert torch.equal(next(again)[0]["input_ids"], found[6][0]["input_ids"])


def test_truncated_batches_keep_what_is_no_sequence(batch: dict[str, Any]) -> None:
    cut = truncate_batch_to_shape(batch, 64)
    assert cut["input_ids"].shape == cut["labels"].shape == (4, 64)
    assert cut["metadata"] == batch["metadata"]
    assert torch.equal(cut["teacher_attention_mask"], batch["teacher_attention_mask"])


def test_length_aware_loss_in_training_step(student: tuple[Decoder, Tokenizer], batch: dict[str, Any]) -> None:
    """An answer of twice the teacher's length, its end included, is penalised by what exceeds the hinge."""
    answer = to_rows(batch)["labels"] != -100
    lengths = answer.sum(-1)
    half = (torch.arange(int(lengths.max()))[None] < (lengths // 2)[:, None]).long()
    loss, found = length_aware_kd_loss(answer, half, torch.tensor([False, False, False, True]))
    excess = (lengths - lengths // 2) / (lengths // 2)
    wanted = (excess[:3] - 0.15).sum() / 4
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert found["len_kd.frac_penalized"] == 0.75
    assert found["len_kd.median_rel_excess"] > 0.15


def test_early_tool_loss_in_training_step(student: tuple[Decoder, Tokenizer], batch: dict[str, Any]) -> None:
    """Rows that should call are held to the first tokens of their own call: -log p of each, by a plain log-softmax."""
    model, tokenizer = student
    logits = model.head(hidden_rows(model, batch["input_ids"]).flatten(0, 1)).view(*batch["input_ids"].shape, -1)
    should, prefix = batch["tool_should_be_used"], batch["teacher_prefix_ids"]
    first = batch["response_start"] - 1
    loss, found = early_tool_call_loss(
        logits, batch["input_ids"], should, tokenizer, prefix, N=5, ce_weight=1.0, response_start=first
    )
    nats = [
        -logits[row, first[row] + k].log_softmax(-1)[prefix[row, k]].item()
        for row in should.nonzero()[:, 0].tolist()
        for k in range(5)
        if prefix[row, k] != -100
    ]
    assert nats
    assert loss.item() == pytest.approx(sum(nats) / len(nats), rel=1e-4, abs=1e-6)
    assert found["early_tool.frac_should_use"] == should.float().mean().item()


def test_latency_losses_with_combined_kd(student: tuple[Decoder, Tokenizer], batch: dict[str, Any]) -> None:
    """All three add up to one number whose gradient reaches the weights."""
    model, tokenizer = student
    rows = to_rows(batch)
    hidden = hidden_rows(model, batch["input_ids"])
    logits = model.head(hidden.flatten(0, 1)).view(*batch["input_ids"].shape, -1)
    teacher = logits.detach() + torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    kd = combined_kd_loss(
        logits, teacher, rows["labels"], rows.get("ground_truth_labels"), loss_mask=rows["labels"] != -100
    )
    answer = rows["labels"] != -100
    length, _ = length_aware_kd_loss(answer.float(), answer[:, :1], torch.zeros(4, dtype=torch.bool))
    early, _ = early_tool_call_loss(
        logits,
        batch["input_ids"],
        batch["tool_should_be_used"],
        tokenizer,
        batch["teacher_prefix_ids"],
        response_start=batch["response_start"] - 1,
    )
    total = kd["total"] + 0.05 * length + 0.05 * early
    assert math.isfinite(total.item())
    assert total.item() > kd["total"].item()
    [slope] = torch.autograd.grad(total, [model.layers[0].attn.q_proj.weight])
    assert slope.abs().max() > 0


def test_qat_enablement_timing() -> None:
    config = {"enabled": True, "start_fraction": 0.8}
    assert [should_enable_qat(step, 1000, config) for step in (0, 799, 800, 999)] == [False, False, True, True]
    assert not should_enable_qat(999, 1000, {})


def test_speed_metrics_with_model(student: tuple[Decoder, Tokenizer]) -> None:
    """The weights in memory, measured in the engine: every figure is there, and follows from the timelines."""
    model, tokenizer = student
    with in_engine(model, tokenizer) as llm:
        found = aggregate_speed_metrics(measure_speed(llm, speed_samples(4, 0)))
    assert found["n"] == 4
    assert 0 < found["ttft_ms"]["p50"] <= found["ttft_ms"]["p95"] < math.inf
    assert found["tps"]["p50"] > 0
    assert {"ttfa_tokens", "ttfa_ms", "ttfa_hit_rate"} <= found.keys()


class TestTrainingStepWithSpeedOptimizations:
    """One optimizer step of a whole work: the loss is logged under its name, and weights move."""

    @staticmethod
    def step(speed: dict[str, Any]) -> dict[str, float]:
        raw = distilled.settings(quant={"enabled": False}, speed={**QUIET, **speed})
        _, work = distilled.made(raw, samples=8)
        found = TestTrainingStepWithSpeedOptimizations.taken(work)
        assert math.isfinite(found["loss"])
        return found

    @staticmethod
    def taken(work: DistillWork) -> dict[str, float]:
        before = work.student.layers[0].attn.q_proj.weight.detach().clone()
        loop = Loop(work, Plan("step", 20, lr=1e-3, warmup=0, accumulate=2), Path("nowhere"))
        loop.state["step"] = 10  # past the ramp
        found = loop.one_step()
        assert not torch.equal(before, work.student.layers[0].attn.q_proj.weight)
        return found

    def test_training_step_with_length_loss(self) -> None:
        found = self.step({"use_length_aware_kd": True, "length_kd_hinge": 0.0, "rollout_every": 1})
        assert found["loss.length_kd"] >= 0
        assert found["loss"] == pytest.approx(sum(v for k, v in found.items() if k.startswith("loss.")), rel=1e-5)
        assert "loss.early_tool" not in found

    def test_training_step_with_early_tool_loss(self) -> None:
        found = self.step({"use_early_tool_call_loss": True})
        assert found["loss.early_tool"] > 0
        assert "loss.length_kd" not in found
