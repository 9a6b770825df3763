"""The losses of a configuration joined: gradients of each, accumulation, layers, rollouts, order of samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dfastllm.distill.config import parse_config
from dfastllm.distill.finish import save_student
from dfastllm.distill.prepare import start_directory
from dfastllm.distill.rollouts import prompts_of
from dfastllm.distill.sampler import Sampler, Shapes
from dfastllm.errors import DataError
from dfastllm.llm import resolve
from dfastllm.models import load
from dfastllm.train.log import read_log
from dfastllm.train.loop import Loop, fit
from dfastllm.train.plan import Plan
from tests.kit import distilled

NO_SHAPES = {"use_enumerated_shapes": False, "seq_lengths": None, "shape_probs": None, "grad_accum": 1}
PLAIN: dict[str, Any] = {"quant": {"enabled": False}, "train": NO_SHAPES}
QUIET: dict[str, Any] = {"speed": {"use_length_aware_kd": False, "use_early_tool_call_loss": False}}


def first_batch(work: Any) -> dict[str, Any]:
    return next(work.batches((0, 0, 0)))[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("mode", ["rollout", "survival"])
def test_both_speed_losses_have_a_gradient(mode: str) -> None:
    """Wordy teachers would not be exceeded: the student's answers are held against one token."""
    speed = {"length_kd_mode": mode, "early_tool_warmup_epochs": 0}
    _, work = distilled.made(distilled.settings(**PLAIN, speed=speed))
    batch = first_batch(work)
    batch["teacher_attention_mask"] = torch.ones(len(batch["input_ids"]), 1)
    found = work.losses(batch, 3)
    for name in ("length_kd", "early_tool"):
        assert found.terms[name].item() > 0
        [slope] = torch.autograd.grad(found.terms[name], [work.student.layers[0].attn.q_proj.weight], retain_graph=True)
        assert slope.abs().max() > 0, name
    assert found.diagnostics["len_kd.frac_penalized"] > 0


def test_a_complete_call_is_never_too_long() -> None:
    speed = {"length_kd_mode": "survival", "exempt_complete": True}
    _, work = distilled.made(distilled.settings(**PLAIN, speed=speed))
    batch = first_batch(work)
    batch["teacher_attention_mask"] = torch.ones(len(batch["input_ids"]), 1)
    batch["required_fields_present"] = torch.ones(len(batch["input_ids"]), dtype=torch.bool)
    assert work.losses(batch, 3).terms["length_kd"].item() == 0


def test_whether_a_rollout_is_complete_is_read_from_its_own_call() -> None:
    _, work = distilled.made(distilled.settings(**PLAIN, **QUIET))
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"required": ["city"]}}}]
    encode = work.objective.tokenizer.encode
    complete = encode('<tool_call>{"name": "f", "arguments": {"city": "Rome"}}</tool_call>')
    without = encode('<tool_call>{"name": "f", "arguments": {}}</tool_call>')
    checked = work.objective._complete
    assert checked({"tools": tools}, complete)
    assert not checked({"tools": tools}, without)
    assert not checked({"tools": tools}, complete[:5])
    assert not checked({}, complete)


def test_rollouts_are_keyed_by_step_and_row_and_end_with_the_end_of_text() -> None:
    """Prompts after which the model is not sure of anything."""
    _, work = distilled.made(distilled.settings(**PLAIN, **QUIET))
    tokenizer = work.objective.tokenizer
    prompts = [tokenizer.encode("The")] * 6
    draw = work.objective.rollouts.draw
    one, again, other = (draw(work.student, prompts, step) for step in (3, 3, 4))
    assert one == again
    assert not set(map(tuple, one)) & set(map(tuple, other))
    assert len(set(map(tuple, one))) == 6
    found = draw(work.student, prompts_of(first_batch(work)), 3)
    assert all(answer[-1] == tokenizer.eos_id for answer in found if len(answer) <= 40)
    assert any(len(answer) <= 40 for answer in found)
    assert all(tokenizer.eos_id not in answer[:-1] for answer in found)


def gradients(work: Any, size: int, pieces: int) -> dict[str, Tensor]:
    """The gradient of one step over the first samples, as `pieces` micro-batches of `size`."""
    work.sampler = Sampler(work.sampler.dataset, size, accumulate=pieces)
    loop = Loop(work, Plan("grad", 1, accumulate=pieces, clip=1e9, warmup=0), Path("nowhere"))
    kept: dict[str, Tensor] = {}
    loop.optimizers[0].register_step_pre_hook(
        lambda *_: kept.update({name: p.grad.clone() for name, p in work.model.named_parameters()})
    )
    loop.one_step()
    return kept


def test_accumulation_is_the_mean_over_the_whole_window() -> None:
    """Four micro-batches of unequal token counts give the gradient of one batch of them all."""
    raw = distilled.settings(**PLAIN, **QUIET)
    whole, parts = (distilled.made(raw, samples=12)[1] for _ in range(2))
    one, many = gradients(whole, 12, 1), gradients(parts, 3, 4)
    assert one.keys() == many.keys()
    for name, value in one.items():
        torch.testing.assert_close(many[name], value, rtol=1e-3, atol=1e-6)


def test_layers_of_a_wider_teacher_are_learnt_through_a_projection_that_is_thrown_away(tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 48, "layers": 2, "heads": 2, "kv_heads": 2, "head_dim": 16}

    source = str(resolve("demo-ar"))
    model = {"student": None, "shape": shape, "tokenizer": source, "max_len": 512}
    start = start_directory(parse_config(distilled.settings(**PLAIN, **QUIET, model=model)), tmp_path)
    raw = distilled.settings(
        **PLAIN, **QUIET, model={"student": str(start)}, kd={"layers_weight": 0.5, "local_teacher": source}
    )
    _, work = distilled.made(raw, samples=8, local="demo-ar")
    names = {name for name, _ in work.model.named_parameters()}
    assert {"projections.0.weight", "projections.1.weight", "layers.0.attn.q_proj.weight"} <= names
    plan = Plan("layers", 25, lr=3e-3, warmup=0, log_every=1, save_every=25, validate_every=25)
    fit(work, plan, tmp_path / "run")

    losses = [line["loss.layers"] for line in read_log(tmp_path / "run" / "log.jsonl")]
    assert losses[-1] < 0.97 * losses[0]
    save_student(work.student, start, tmp_path / "out", "float32")
    kept = load(tmp_path / "out")
    assert all(torch.equal(p, q) for p, q in zip(kept.parameters(), work.student.parameters(), strict=True))


def test_the_local_teacher_gives_the_divergence() -> None:
    """A student that is its own teacher has none; another one has."""
    raw = distilled.settings(**PLAIN, **QUIET, kd={"local_teacher": "demo-draft"})
    _, work = distilled.made(raw, samples=4, local="demo-draft")
    own = work.losses(first_batch(work), 0).terms["kl_div"].item()
    assert abs(own) < 1e-4
    _, other = distilled.made(raw, samples=4, local="demo-ar")
    assert other.losses(first_batch(other), 0).terms["kl_div"].item() > 1000 * abs(own) + 1e-4


def test_an_epoch_sees_every_sample_once_and_goes_on_at_any_position() -> None:
    _, work = distilled.made(distilled.settings(**PLAIN, **QUIET), samples=10)
    sampler = Sampler(work.sampler.dataset, 4, seed=3)
    stream = sampler.at((0, 0, 0))
    first = [next(stream) for _ in range(6)]
    seen = [row["id"] for batch, _ in first[:3] for row in batch["metadata"]]
    assert sorted(seen, key=int) == sorted({row["metadata"]["id"] for row in work.sampler.dataset}, key=int)  # type: ignore[attr-defined]
    assert first[2][1] == (1, 0, 3)
    again = sampler.at(first[1][1])
    for batch, position in first[2:]:
        other, after = next(again)
        assert after == position
        assert torch.equal(other["input_ids"], batch["input_ids"])
    order = [row["id"] for batch, _ in first[3:] for row in batch["metadata"]]
    assert order != seen


def test_the_shapes_of_a_window_are_one_and_samples_that_do_not_fit_are_counted() -> None:
    _, work = distilled.made(distilled.settings(**PLAIN, **QUIET), samples=12)
    longest = max(work.sampler.dataset.lengths())
    sampler = Sampler(work.sampler.dataset, 3, accumulate=2, shapes=Shapes((longest // 2, longest), (0.5, 0.5)))
    widths = [batch["input_ids"].shape[1] for batch, _ in (next(s) for s in [sampler.at((0, 0, 0))] for _ in range(8))]
    assert widths[::2] == widths[1::2]
    assert set(widths) == {longest // 2, longest}
    assert sum(sampler.drawn.values()) == 8
    tight = Sampler(work.sampler.dataset, 3, shapes=Shapes((2, 3), (0.5, 0.5)))
    with pytest.raises(DataError, match="no response of a whole epoch"):
        next(tight.at((0, 0, 0)))
