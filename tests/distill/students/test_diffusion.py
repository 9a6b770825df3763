"""A canvas student's run: it learns, records itself and resumes to the bit; what cannot be is refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dfastllm import models
from dfastllm.core import DecodeParams, SamplingParams
from dfastllm.distill.check import check_config
from dfastllm.distill.config import parse_config
from dfastllm.distill.run import run_distillation
from dfastllm.distill.sections import Config
from dfastllm.distill.students.curve import Pair, Point, again, curve, measure, quickest_equal
from dfastllm.distill.students.diffusion import Prompts, TrajectoryWork
from dfastllm.distill.students.trajectory import Trajectory, read_trajectories, write_trajectories
from dfastllm.errors import DataError, UnsupportedError, ValidationError
from dfastllm.llm import LLM, resolve
from dfastllm.metrics.evaluation import Row
from dfastllm.tasks import MIXED, draw
from dfastllm.text.tokenizer import Tokenizer
from dfastllm.train.log import read_log

MIX = {"arithmetic": 0.0, "prose": 0.0, "tools": 0.0, "code": 0.0, "extract": 0.0}


def configured(**sections: Mapping[str, Any]) -> Config:
    """A run of seconds; sections: changed keys by section."""
    raw: dict[str, dict[str, Any]] = {
        "model": {"student": "demo-diffusion", "dtype": "float32"},
        "data": {"generate": {"samples": 16, "validation": 8, "mix": MIX}},
        "train": {"steps": 4, "micro_batch_size": 8, "val_every": 4, "save_every": 2, "log_every": 1, "warmup": 1},
        "kd": {
            "trajectory": {
                "decode": {"factor": 1.0},
                "max_tokens": 32,
                "windows": [32],
                "canvases": [-1],
                "every": 2,
                "fresh": 8,
            }
        },
        "eval": {"samples": 0, "validation": 0, "max_tokens": 32},
    }
    raw["train"]["tensorboard"] = False
    for name, changed in sections.items():
        for key, value in changed.items():
            raw[name][key] = raw[name].get(key, {}) | value if isinstance(value, dict) else value
    return parse_config(raw)


def weights(out: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(out / "run" / f"step-{step}" / "weights.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run that measures before and after."""
    out = tmp_path_factory.mktemp("whole")
    run_distillation(configured(eval={"samples": 8, "validation": 4}), out)
    return out


def test_a_run_records_learns_and_exports_a_student_that_answers(whole: Path) -> None:
    header, first = read_trajectories(whole / "trajectories.jsonl", 1280)
    assert header["model"] == "demo-diffusion"
    assert header["counts"]["right"] == len(first) >= 12
    lines = read_log(whole / "run" / "log.jsonl")
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert all(math.isfinite(line[name]) for line in steps for name in ("loss.trajectory", "loss.certainty"))
    assert all(0 <= line["sure"] <= line["right"] <= 1 for line in steps)
    (recorded,) = [line for line in lines if line.get("event") == "recorded"]
    _, own = read_trajectories(whole / "run" / "round-1.jsonl", 1280)
    assert recorded["right"] == len(own) >= 5
    assert recorded["tokens_per_forward"] > 1
    assert {one.id for one in own} <= {f"tasks/train/0/{i}" for i in range(8)}  # the prompts of the set, from its start
    assert steps[-1]["task.tokens_per_forward"] > 1
    assert 0 < steps[-1]["task.exact_match"] <= 1
    figures = json.loads((whole / "figures.json").read_text())
    assert figures["samples"] == 8
    assert figures["before"]["exact_match"] >= 0.75
    with LLM(whole / "student") as llm:
        assert llm.chat([{"role": "user", "content": "Make a bullet list: apple, river, stone"}])[0].text.startswith(
            "- "
        )


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(whole: Path, tmp_path: Path) -> None:
    """Stopped after the student's own answers came in, and in the middle of learning from them."""
    config = configured(eval={"samples": 0, "validation": 0})
    run_distillation(config, tmp_path, steps=3)
    assert (tmp_path / "run" / "round-1.jsonl").is_file()
    run_distillation(config, tmp_path)
    for name, tensor in weights(whole, 4).items():
        assert torch.equal(tensor, weights(tmp_path, 4)[name]), name
    with pytest.raises(ValidationError, match="earlier run"):
        run_distillation(config, tmp_path, resume=False)


@pytest.mark.parametrize("own_data", [False, True])
def test_a_check_tries_the_whole_way_on_a_few_prompts(own_data: bool, tmp_path: Path) -> None:
    raw = configured(train={"steps": 1000}).model_dump(mode="json")
    raw["data"]["generate"]["samples"] = 1_000_000
    if own_data:
        rows = [{"prompt": f"Number these: apple, river, cloud {i}", "teacher_text": "1. apple"} for i in range(60)]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        raw["data"] = {"train": [str(tmp_path / "rows.jsonl")]}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    checks = check_config(tmp_path / "run.yaml", threads=1)
    assert [(check.name, check.passed) for check in checks] == [("configuration", True), ("trajectories", True)]
    assert f"{17 if own_data else 16} trajectories" in checks[1].found
    assert "loss.certainty" in checks[1].found


def test_a_check_says_what_cannot_be_trained(tmp_path: Path) -> None:
    raw = configured(model={"student": "demo-ar"}).model_dump(mode="json")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    checks = check_config(tmp_path / "run.yaml", threads=1)
    assert not checks[1].passed
    assert "autoregressive" in checks[1].found


def work_of(config: Config, first: list[Trajectory], home: Path, model: str = "demo-diffusion") -> TrajectoryWork:
    path = resolve(model)
    tokenizer = Tokenizer.load(path)
    net = models.load(path, dtype=torch.float32).requires_grad_(True)
    rows = home / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "What is 1 + 1?"}))
    return TrajectoryWork(config, net, tokenizer, home, first, Prompts(config, [rows], tokenizer))


@pytest.mark.parametrize("model", ["demo-diffusion", "demo-block"])
def test_training_makes_a_model_sure_of_its_trajectories(model: str, whole: Path, tmp_path: Path) -> None:
    """On four trajectories, from the same noise: more is right, and more of it is sure, after twelve steps."""
    _, first = read_trajectories(whole / "trajectories.jsonl", 1280)
    windows = {"windows": [32] if model == "demo-diffusion" else [], "whole": 1.0, "every": 0}
    config = configured(kd={"trajectory": windows}, model={"student": model}, train={"steps": 12})
    work = work_of(config, first[:4], tmp_path, model)
    batch, _ = next(work.batches(work.start))
    optimizer = torch.optim.AdamW(work.model.parameters(), lr=1e-3)
    before = work.losses(batch, 0)
    for step in range(12):
        terms = work.losses(batch, step).terms
        torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    after = work.losses(batch, 11)
    for name in ("trajectory", "certainty"):
        assert after.terms[name].item() < 0.8 * before.terms[name].item()
    assert after.diagnostics["sure"] > before.diagnostics["sure"]
    assert after.samples == 4


def test_batches_are_a_pure_function_of_the_position(whole: Path, tmp_path: Path) -> None:
    _, first = read_trajectories(whole / "trajectories.jsonl", 1280)
    config = configured(train={"micro_batch_size": 3})
    work = work_of(config, first, tmp_path)
    stream = work.batches(work.start)
    seen = [next(stream) for _ in range(12)]
    each = -(-len(first) // 3)
    epoch = [one.id for batch, _ in seen[:each] for one in batch.ones]
    assert sorted(epoch) == sorted(one.id for one in first)
    assert epoch != [one.id for batch, _ in seen[each : 2 * each] for one in batch.ones]
    for i in (0, 4, each - 1, each):
        position = json.loads(json.dumps(seen[i][1]))
        again = work.batches(position)
        assert [next(again) for _ in range(3)] == seen[i + 1 : i + 4]


def test_certainty_of_weight_0_is_left_out(whole: Path, tmp_path: Path) -> None:
    _, first = read_trajectories(whole / "trajectories.jsonl", 1280)
    work = work_of(configured(kd={"certainty": {"weight": 0.0}}), first[:4], tmp_path)
    batch, _ = next(work.batches(work.start))
    assert list(work.losses(batch, 0).terms) == ["trajectory"]


def test_a_failed_measurement_is_said_and_training_goes_on(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no engine today")

    monkeypatch.setattr("dfastllm.distill.students.diffusion.measure", fails)
    _, first = read_trajectories(whole / "trajectories.jsonl", 1280)
    work = work_of(configured(eval={"validation": 2}), first, tmp_path)
    assert work.validate(4) == {"speed.measure_failed": "RuntimeError: no engine today"}


def test_a_named_file_is_learnt_from_in_place_of_a_recording(whole: Path, tmp_path: Path) -> None:
    _, first = read_trajectories(whole / "trajectories.jsonl", 1280)
    path = tmp_path / "mine.jsonl"
    write_trajectories(path, first[:8], {})
    config = configured(kd={"trajectory": {"file": str(path), "every": 0}}, train={"steps": 1})
    run_distillation(config, tmp_path / "out")
    assert not (tmp_path / "out" / "trajectories.jsonl").exists()
    path.write_text("")
    with pytest.raises(DataError, match="no trajectory"):
        run_distillation(config, tmp_path / "other")


def test_rows_of_files_are_asked_over_and_over(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    samples = [draw("train", 0, i, "rewrite") for i in range(3)]
    rows = [{"prompt": s.messages[-1]["content"], "grader": s.grader, "expected": s.expected} for s in samples]
    path.write_text("\n".join(map(json.dumps, rows)))
    config = parse_config(
        {
            "model": {"student": "demo-diffusion"},
            "data": {"train": [str(path)], "validation": [str(path)]},
            "kd": {"trajectory": {}},
        }
    )
    prompts = Prompts(config, [path], Tokenizer.load(resolve("demo-diffusion")))
    assert [question.expected for question in prompts.take(2, 2)] == [samples[i].expected for i in (2, 0)]
    assert len(prompts.take(4, 9)) == 3
    path.write_text("\n".join(json.dumps({**row, "teacher_text": row["expected"]}) for row in rows))
    assert [sample.expected for sample in prompts.held_out(2, "test")] == [s.expected for s in samples[:2]]
    path.write_text("[]")
    with pytest.raises(DataError, match="no row"):
        Prompts(config, [path], Tokenizer.load(resolve("demo-diffusion")))


@pytest.mark.parametrize(
    ("sections", "error", "says"),
    [
        ({"model": {"student": "demo-ar"}}, UnsupportedError, "autoregressive"),
        ({"kd": {"local_teacher": "demo-ar"}}, UnsupportedError, "no trajectory"),
        ({"kd": {"trajectory": {"decode": {"rule": "none such"}}}}, UnsupportedError, "none such"),
        ({"model": {"student": "demo-block"}}, UnsupportedError, "windows"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_a_step(
    sections: dict[str, Any], error: type[Exception], says: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=says):
        run_distillation(configured(**sections), tmp_path)
    assert not (tmp_path / "run" / "log.jsonl").exists()


# ---- the curve -------------------------------------------------------------------------------------------------------


def point(name: str, right: int, forwards: float, count: int = 1200) -> Point:
    rows = tuple(
        Row(f"s{i}", "t", i < right, 12, int(forwards), 12, 12, math.inf, math.inf, None, None, None, None, None, "")
        for i in range(count)
    )
    return Point(name, right / count, 12.0, forwards, rows)


def test_the_quickest_equal_point_is_the_one_shown_to_be_no_worse() -> None:
    before = point("before", 1140, 2)
    after = [point("slow", 1140, 3), point("equal", 1139, 1.5), point("worse", 1080, 1)]
    found = quickest_equal(before, after)
    assert found is not None
    assert found.setting == "equal"
    assert quickest_equal(before, after[2:]) is None


def test_points_are_what_the_engine_counts() -> None:
    samples = [draw("test", 0, i, "rewrite") for i in range(6)]
    greedy = SamplingParams(temperature=0.0, max_tokens=32)
    with LLM("demo-diffusion") as llm:
        slow, quick = curve(llm, samples, 32, ({"rule": "schedule"}, {"factor": 1.0}))
        outputs = [llm.chat(list(s.messages), greedy, DecodeParams(factor=1.0))[0].outputs[0] for s in samples]
        own = measure(llm, samples, {}, 32)
    assert quick.forwards == pytest.approx(sum(o.usage.forwards for o in outputs) / 6)
    assert quick.tokens == pytest.approx(sum(o.usage.completion_tokens for o in outputs) / 6)
    assert quick.tokens_per_forward > 3 * slow.tokens_per_forward
    assert (own.forwards, own.exact_match) == (slow.forwards, slow.exact_match)
    assert json.loads(quick.record()["setting"]) == {"factor": 1.0}


def test_chosen_pairs_are_measured_on_other_samples() -> None:
    """Its figures against those of the two settings measured by themselves."""
    samples = [draw("test", 1, i, task) for task in ("rewrite", "code") for i in range(3)]
    chosen = Pair('{"factor": 0.25}', '{"factor": 2.0}')
    with LLM("demo-diffusion") as llm:
        slow, quick = curve(llm, samples, 32, ({"factor": 0.25}, {"factor": 2.0}))
        (found,) = again(llm, llm, [chosen], samples, 32)
    assert (found["before"], found["after"]) == (chosen.before, chosen.after)
    assert found["points"] == [slow.record(), quick.record()]
    wanted = quick.tokens_per_forward / slow.tokens_per_forward
    assert wanted > 1
    assert found["tokens_per_forward"]["median"] == pytest.approx(wanted)
    assert found["equality"]["n"] == 6
    assert slow.by_task == {
        task: sum(row.right for row in slow.rows if row.task == task) / 3 for task in ("rewrite", "code")
    }


def test_what_is_measured_has_the_tasks_that_are_learnt(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "What is 1 + 1?"}))
    tokenizer = Tokenizer.load(resolve("demo-diffusion"))
    for data, wanted in (
        ({"mix": {"table": 1.0, "code": 0.0}}, {*MIXED, "table"} - {"code", "prose"}),
        ({"mix": {}, "tasks": ["listing", "prose"]}, {"listing"}),
    ):
        prompts = Prompts(configured(data={"generate": data}), [rows], tokenizer)
        for split in ("validation", "test"):
            assert {sample.task for sample in prompts.held_out(14, split)} == wanted  # type: ignore[arg-type]
        assert prompts.held_out(0, "test") == []
