"""The whole of it at a tiny size: a teacher behind this project's server, every feature on, a student that is served.

One run is made once and looked at from several sides; the others are what can go wrong in it.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import dfastllm.distill.qat.run as qat_run
import dfastllm.distill.run as distill_run
from dfastllm.core import SamplingParams
from dfastllm.distill.config import parse_config
from dfastllm.distill.evaluate import read_samples
from dfastllm.distill.finish import Report, show
from dfastllm.distill.run import run_distillation
from dfastllm.errors import TeacherError, ValidationError
from dfastllm.llm import LLM, load_engine
from dfastllm.tasks import grade
from dfastllm.train.log import read_log
from tests.kit import distilled
from tests.kit.live import Live, serving

START = int(0.8 * distilled.STEPS)  # the first rounded step, 0-based
WEIGHTS = ("weights.safetensors", "optimizer.safetensors")


@dataclass
class World:
    live: Live
    raw: dict[str, Any]
    home: Path
    report: Report
    asked: float  # requests that the teacher's server answered for the first run

    def again(self, name: str, step: int = 0) -> Path:
        """A directory of another run, with the answers of the first, so that its teacher has nothing left to say; from
        `step` on."""
        home = self.home.parent / name
        home.mkdir()
        for part in ("data", *([f"step-{step}"] if step else [])):
            shutil.copytree(self.home / part, home / part)
        shutil.copy(self.home / "log.jsonl", home)
        return home


def answered(live: Live) -> float:
    """Requests that the server has answered well."""
    return sum(
        sample.value
        for family in live.serving.metrics.registry.collect()
        for sample in family.samples
        if sample.name == "dfastllm_http_requests_total" and sample.labels["status"] == "200"
    )


@contextmanager
def refusing_after(live: Live, count: int) -> Iterator[None]:
    """The server answers so many more chats, and then 503."""
    left = [count]

    class Refuses:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "http" and scope["path"].endswith("/completions"):
                left[0] -= 1
                if left[0] < 0:
                    await send({"type": "http.response.start", "status": 503, "headers": []})
                    await send({"type": "http.response.body", "body": b"down"})
                    return
            await self.app(scope, receive, send)

    whole = live.app.middleware_stack
    live.app.middleware_stack = Refuses(whole)
    try:
        yield
    finally:
        live.app.middleware_stack = whole


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("distil")
    train, held_out = distilled.prompts(place)
    start = distilled.noisy("demo-draft", place / "start")
    with serving({"demo-ar": load_engine("demo-ar")}) as live:
        raw = distilled.settings(
            model={"student": str(start)},
            data={"generate": None, "train": [str(train)], "validation": [str(held_out)]},
            kd={"teacher": {"base_url": live.url, "model": "demo-ar", "top_logprobs": 8, "max_tokens": 64}},
        )
        home = place / "whole"
        report = run_distillation(parse_config(raw), home, threads=1, say=lambda line: None)
        assert report is not None
        yield World(live, raw, home, report, answered(live))


def lines(home: Path) -> list[dict[str, Any]]:
    return [line for line in read_log(home / "log.jsonl") if "event" not in line]


def events(home: Path) -> list[tuple[str, int]]:
    return [(line["event"], line["step"]) for line in read_log(home / "log.jsonl") if "event" in line]


def test_losses_are_finite_and_fall_and_both_speed_losses_act(world: World) -> None:
    log = lines(world.home)
    assert [line["step"] for line in log] == list(range(1, distilled.STEPS + 1))
    names = ("kl_div", "ce_teacher", "ce_ground_truth", "tool_name", "json_args", "length_kd", "early_tool")
    for name in names:
        values = [line[f"loss.{name}"] for line in log if f"loss.{name}" in line]  # every third step has rollouts
        assert all(math.isfinite(value) for value in values), name
        assert sum(values) > 0, name
    assert log[0]["loss.early_tool"] == 0  # the ramp begins at 0
    learnt = [line["loss.kl_div"] + line["loss.ce_teacher"] for line in log]
    assert sum(learnt[-4:]) < 0.5 * sum(learnt[:4])
    assert {"validation_ce", "task.exact_match", "speed.ttft_ms.p50"} <= log[-1].keys()
    assert ["len_kd.frac_penalized" in line for line in log] == [step % 3 == 0 for step in range(distilled.STEPS)]
    assert log[3]["early_tool.frac_target_available"] > 0


def test_rounding_begins_at_four_fifths_with_a_lower_rate(world: World) -> None:
    assert ("qat.on", START + 1) in events(world.home)  # the first rounded step
    assert [line["step"] for line in lines(world.home) if "lr_factor" in line] == list(range(START + 1, 16))
    assert world.report.qat == "active"
    assert (world.home / f"step-{START}").is_dir()  # the last one in float stays, to go back to


def test_a_killed_run_goes_on_to_the_same_bits_and_asks_no_teacher(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = world.again("killed")
    config = parse_config(world.raw)
    before = answered(world.live)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt  # no Exception: nothing of the run sees it coming

    with monkeypatch.context() as patch:
        patch.setattr(distill_run, "probe", killed)
        with pytest.raises(KeyboardInterrupt):
            run_distillation(config, home, threads=1, say=lambda line: None)
    assert [path.name for path in sorted(home.glob("step-*"))] == ["step-5"]
    assert run_distillation(config, home, steps=13, threads=1, say=lambda line: None) is None  # and once more, rounded
    report = run_distillation(config, home, threads=1, say=lambda line: None)
    assert report is not None
    for file in WEIGHTS:
        ours, whole = (load_file(place / f"step-{distilled.STEPS}" / file) for place in (home, world.home))
        assert ours.keys() == whole.keys()
        assert [name for name in ours if not torch.equal(ours[name], whole[name])] == []
    timed = ("seconds", "speed.", "validation", "task.")  # the clock's, and those of the step at which it was stopped

    def kept(home: Path) -> list[dict[str, Any]]:
        return [{k: v for k, v in line.items() if not k.startswith(timed)} for line in lines(home)]

    assert kept(home) == kept(world.home)
    assert events(home) == events(world.home)
    assert answered(world.live) == before
    with pytest.raises(ValidationError, match=r"another configuration: train\.lr differ"):
        run_distillation(parse_config(distilled.changed(world.raw, train={"lr": 0.5})), home)
    with pytest.raises(ValidationError, match="earlier run"):
        run_distillation(config, home, resume=False)


def test_a_teacher_that_is_down_loses_nothing(world: World) -> None:
    """Down from the fifth question on; then it is back, and is not asked the first four again."""
    home = world.home.parent / "down"
    teacher = {**world.raw["kd"]["teacher"], "attempts": 1, "give_up_after": 2, "concurrency": 1}
    config = parse_config(distilled.changed(world.raw, kd={"teacher": teacher}))
    before = answered(world.live)
    with refusing_after(world.live, 4), pytest.raises(TeacherError):
        run_distillation(config, home, say=lambda line: None)
    assert not list(home.glob("step-*"))
    assert answered(world.live) == before + 4
    assert run_distillation(config, home, steps=1, threads=1, say=lambda line: None) is None
    assert (home / "step-1").is_dir()
    assert answered(world.live) == before + world.asked


def test_rounding_that_breaks_is_given_up_and_the_run_ends_in_float(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qat_run, "check_qat_stability", lambda *_, **__: {"has_nan": 1.0, "cosine_sim": 0.0})
    home = world.again("nan", START)
    raw = distilled.changed(world.raw, speed={"measure": 0}, eval={"samples": 0, "validation": 0})
    report = run_distillation(parse_config(raw), home, threads=1, say=lambda line: None)
    assert report is not None
    assert (report.qat, report.quantised) == ("qat_failed", None)
    assert [name for name, _ in events(home)].count("qat.failed") == 2
    assert lines(home)[-1]["step"] == distilled.STEPS
    float_run = load_file(home / f"step-{distilled.STEPS}" / "weights.safetensors")
    assert all(bool(value.isfinite().all()) for value in float_run.values())


def test_a_measurement_that_fails_is_logged_and_training_goes_on(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no clock")

    monkeypatch.setattr(distill_run, "probe", broken)
    home = world.again("probe", START)
    run_distillation(parse_config(world.raw), home, steps=START + 1, threads=1, say=lambda line: None)
    last = lines(home)[-1]
    assert (last["step"], last["speed.measure_failed"]) == (START + 1, "RuntimeError: no clock")
    assert math.isfinite(last["validation_loss"])
    assert (home / f"step-{START + 1}").is_dir()


def test_the_run_ends_with_gates_pictures_and_a_summary(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    gates = json.loads((world.home / "gates.json").read_text())
    assert {"gates_passed", "ttft_regression", "tps_regression", "ttfa_gate", "errors"} <= gates.keys()
    assert not gates["skipped"]  # the baseline is of this machine
    report = json.loads((world.home / "report.json").read_text())
    assert report["comparison"]["equality"]["n"] == 12
    assert {Path(path).name for path in report["plots"]} >= {"training.png", "comparison.png"}
    show(world.report)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines()[:10])) <= 80
    for word in ("right answers", "tokens of an answer, median", "speed gates", "active"):
        assert word in shown


def test_the_exported_student_is_served_and_right(world: World) -> None:
    """The directory that was trained to be rounded, over HTTP: the tokens of the engine, and answers that are right."""
    served = world.report.served
    assert json.loads((served / "config.json").read_text())["quantization_config"]["format"] == "w8g"
    asked = read_samples(world.home / "data" / "train.answers.jsonl").samples  # what it was taught
    answers, right = [], []
    for model in (world.raw["model"]["student"], served):
        with LLM(model) as llm:
            greedy = SamplingParams(temperature=0.0, max_tokens=64)
            answers.append([llm.chat(s.messages, greedy, tools=list(s.tools) or None)[0].text for s in asked])
        right.append(sum(grade(sample, text) for sample, text in zip(asked, answers[-1], strict=True)))
    assert right[1] >= max(0.6 * len(asked), right[0] + 4)
    texts = answers[1]
    plain = next(i for i, sample in enumerate(asked) if not sample.tools)
    with serving({"tiny": load_engine(served)}) as live:
        body = {"model": "tiny", "messages": list(asked[plain].messages), "temperature": 0, "max_tokens": 64}
        answer = live.post("/v1/chat/completions", body).json()
    assert answer["choices"][0]["message"]["content"] == texts[plain]
