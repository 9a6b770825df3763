"""The loop on works of a few numbers: accumulation, the guard, going back, the log; recipes against a plain loop."""

from __future__ import annotations

import io
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor, nn

from dfastllm.errors import TrainingError, ValidationError
from dfastllm.text.tokenizer import Tokenizer
from dfastllm.train import Losses, Plan, Recipe, Work, fit
from dfastllm.train.checkpoint import latest
from dfastllm.train.data import Stream
from dfastllm.train.log import RunLog, progress, read_log
from dfastllm.train.loop import Loop
from dfastllm.train.objectives import loss, make_objective
from dfastllm.train.plan import make_optimizers, rate
from dfastllm.train.run import build_model, run

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "layers": 2, "heads": 2, "kv_heads": 2, "head_dim": 16}


class Line(Work):
    """Fits y = 3x - 1 from `rows` points a micro-batch. Draws noise from the global generator."""

    start = 0

    def __init__(self, rows: int = 8, noise: float = 0.0) -> None:
        self.model = nn.Linear(1, 1)
        with torch.no_grad():
            self.model.weight.fill_(0.5)
            self.model.bias.fill_(0.0)
        self.rows, self.noise = rows, noise
        self.bad: dict[int, str] = {}  # step -> the term that is NaN there
        self.went_back = 0

    def batches(self, position: int) -> Iterator[tuple[Tensor, int]]:
        while True:
            generator = torch.Generator().manual_seed(position)
            yield torch.randn(self.rows, 1, generator=generator), position + 1
            position += 1

    def losses(self, batch: Tensor, step: int) -> Losses:
        wanted = 3 * batch - 1 + self.noise * torch.randn(batch.shape)
        terms = {"fit": (self.model(batch) - wanted).pow(2).mean(), "size": 1e-3 * self.model.weight.pow(2).sum()}
        if step in self.bad:
            terms[self.bad[step]] = terms[self.bad[step]] * math.nan
        return Losses(terms, {"rows": float(len(batch))}, tokens=len(batch), samples=1)


def plan(**more: Any) -> Plan:
    values = {
        "steps": 12,
        "lr": 0.05,
        "matrix_lr": 0.05,
        "warmup": 2,
        "save_every": 4,
        "validate_every": 6,
        "log_every": 1,
    }
    return Plan("line", **{**values, **more})


def same(a: Path, b: Path) -> bool:
    files = [(load_file(a / f), load_file(b / f)) for f in ("weights.safetensors", "optimizer.safetensors")]
    return all(x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in files)


def test_recipes_train_to_the_bits_of_a_plain_loop(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses and weights of a recipe, from nothing but torch and the objective: what the loop must add up to."""
    monkeypatch.setattr("dfastllm.train.data.WINDOW", 64)
    values: dict[str, Any] = {"steps": 5, "batch_tokens": 600, "warmup": 2, "bf16": False, "optimizer": "muon"}
    recipe = Recipe("plain", "llada", "masked_diffusion", SHAPE, **values)
    done = run(recipe, runs=runs, log_every=1, save_every=5)
    tokenizer = Tokenizer.load(runs / "tokenizer")
    model = build_model(recipe, tokenizer)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("layers.")]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or not name.startswith("layers.")]
    optimizers = [
        torch.optim.AdamW(rest, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
        torch.optim.Muon(matrices, lr=2e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
    ]
    objective = make_objective("masked_diffusion", model, recipe.slack, recipe.power)
    stream = Stream(tokenizer, "train", 0, 600, objective.cost).at((0, 0))
    losses = []
    for step in range(5):
        batch, _ = next(stream)
        rows = objective.rows(batch.examples, torch.Generator().manual_seed(batch.number))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * min(1.0, (step + 1) / 2) * min(1.0, (5 - step) / 1.25)
        value = loss(model, rows)
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(round(value.item(), 5))
    assert [line["loss"] for line in read_log(done.parent / "log.jsonl")] == losses
    kept = load_file(done / "weights.safetensors")
    assert all(torch.equal(kept[name], p) for name, p in model.named_parameters())


def test_accumulation_is_one_large_batch() -> None:
    """Micro-batches of unequal size count by their rows: the gradient is that of the mean over all rows."""

    class Uneven(Line):
        def batches(self, position: int) -> Iterator[tuple[Tensor, int]]:
            points = torch.linspace(-2, 2, 12)[:, None]
            yield from ((points[:3], 1), (points[3:], 2)) if self.rows else ((points, 1),)

        def counts(self, batch: Tensor) -> Mapping[str, float]:
            return {"fit": float(len(batch))}

    steps = []
    for rows, pieces in ((0, 1), (1, 2)):
        work = Uneven(rows)
        told = plan(steps=1, accumulate=pieces, warmup=0, clip=1e9)
        loop = Loop(work, told, Path("nowhere"))
        kept: dict[str, Tensor] = {}
        for optimizer in loop.optimizers:
            optimizer.register_step_pre_hook(
                lambda *_, w=work, k=kept: k.update({n: p.grad.clone() for n, p in w.model.named_parameters()})
            )
        assert loop._step(work.batches(0), 0)
        steps.append((kept, loop.sums))
    (whole, one), (parts, two) = steps
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-5, atol=1e-6)
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-6)
    assert two["loss.fit"] == pytest.approx(one["loss.fit"], rel=1e-6)


def test_a_killed_run_goes_on_to_the_same_bits_with_global_noise(tmp_path: Path) -> None:
    work = Line(noise=0.5)
    before = torch.get_rng_state()
    a = fit(work, plan(accumulate=2), tmp_path / "a")
    assert torch.equal(before, torch.get_rng_state())  # the caller's generator is its own
    fit(Line(noise=0.5), plan(accumulate=2), tmp_path / "b", stop=5)
    log = tmp_path / "b" / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 6, "loss": 9.0}\n{"step": 7, "lo')  # of a process that was killed
    torn = tmp_path / "b" / ".step-8.4711"
    torn.mkdir()
    (torn / "weights.safetensors").write_bytes(b"torn")
    b = fit(Line(noise=0.5), plan(accumulate=2), tmp_path / "b")
    assert same(a, b)
    assert not torn.exists()
    logs = [read_log(home / "log.jsonl") for home in (tmp_path / "a", tmp_path / "b")]
    assert [{**line, "seconds": 0} for line in logs[0]] == [{**line, "seconds": 0} for line in logs[1]]
    assert [line["step"] for line in logs[0]] == list(range(1, 13))
    assert logs[0][-1]["loss"] < logs[0][0]["loss"]
    assert logs[0][0]["rows"] == 8
    assert logs[0][0]["loss"] == pytest.approx(logs[0][0]["loss.fit"] + logs[0][0]["loss.size"], abs=2e-5)
    assert (logs[0][-1]["tokens"], logs[0][-1]["samples"]) == (12 * 2 * 8, 24)


@pytest.mark.parametrize("term", ["fit", "size"])
def test_the_guard_names_the_loss_and_the_last_good_checkpoint(term: str, tmp_path: Path) -> None:
    work = Line()
    work.bad = {9: term}
    with pytest.raises(TrainingError, match=rf"step 10: {term} is not finite.*step-8") as caught:
        fit(work, plan(), tmp_path)
    assert caught.value.names == (term,)
    assert all(p.isfinite().all() for p in work.model.parameters())
    assert fit(Line(), plan(), tmp_path).name == "step-12"  # nothing was lost


def test_the_guard_names_a_gradient(tmp_path: Path) -> None:
    class Steep(Line):
        def losses(self, batch: Tensor, step: int) -> Losses:
            flat = self.model.weight.sum() * 0
            return Losses({"root": (flat.sqrt() if step == 2 else flat + 1) + super().losses(batch, step).terms["fit"]})

    with pytest.raises(TrainingError, match=r"step 3: the gradient of weight is not finite\. There is no checkpoint"):
        fit(Steep(), plan(), tmp_path)


def test_a_loss_that_raises_with_names_is_a_broken_loss(tmp_path: Path) -> None:
    class Raises(Line):
        names: tuple[str, ...]

        def losses(self, batch: Tensor, step: int) -> Losses:
            raise (
                TrainingError("kl_div is not finite.", names=("kl_div",)) if step else TrainingError("another matter.")
            )

    with pytest.raises(TrainingError, match=r"^another matter\.$"):
        fit(Raises(), plan(), tmp_path)


class Recovers(Line):
    """Goes back when its term breaks, and does not try again: as training on rounded weights does."""

    def __init__(self) -> None:
        super().__init__()
        self.bad = {9: "size"}
        self.seen: list[int] = []
        self.told: list[Mapping[str, Any]] = []

    def before_step(self, step: int) -> None:
        self.seen.append(step)

    def rate_factor(self, step: int) -> float:
        return 0.5 if step >= 6 and self.bad else 1.0

    def broken(self, step: int, names: tuple[str, ...]) -> bool:
        self.bad = {}
        self.told = [{"event": "gave_up", "why": names[0]}]
        return True

    def events(self) -> list[Mapping[str, Any]]:
        told, self.told = self.told, []
        return told

    def good(self, state: Mapping[str, Any]) -> bool:
        return not state.get("trying")

    def milestones(self) -> tuple[int, ...]:
        return (6,)

    def extra_state(self) -> dict[str, Any]:
        return {"bad": list(self.bad), "trying": bool(self.bad) and self.seen[-1] >= 6}

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        self.bad = dict.fromkeys(state["bad"], "size")


def test_going_back_takes_the_newest_good_checkpoint_and_is_remembered(tmp_path: Path) -> None:
    work = Recovers()
    done = fit(work, plan(), tmp_path / "a")
    assert work.seen == [*range(10), *range(6, 12)]  # step-8 was not a good one
    events = [line for line in read_log(tmp_path / "a" / "log.jsonl") if "event" in line]
    assert [(e["step"], e["event"]) for e in events] == [(10, "gave_up"), (6, "went_back")]
    assert json.loads((done / "state.json").read_text())["work"] == {"bad": [], "trying": False}
    calm = Recovers()
    calm.bad = {}
    assert same(done, fit(calm, plan(), tmp_path / "b"))


def test_going_back_without_a_good_checkpoint_is_an_error(tmp_path: Path) -> None:
    work = Recovers()
    work.bad = {1: "fit"}
    with pytest.raises(TrainingError, match="no good checkpoint"):
        fit(work, plan(), tmp_path)


def test_an_earlier_run_is_refused_unless_resumed(tmp_path: Path) -> None:
    fit(Line(), plan(), tmp_path)
    with pytest.raises(ValidationError, match="earlier run"):
        fit(Line(), plan(), tmp_path, resume=False)


def test_only_what_wants_a_gradient_is_trained(tmp_path: Path) -> None:
    work = Line()
    work.model.bias.requires_grad_(False)
    fit(work, plan(), tmp_path)
    assert work.model.bias.item() == 0
    assert work.model.weight.item() != 0.5
    work.model.requires_grad_(False)
    with pytest.raises(ValidationError, match="wants a gradient"):
        make_optimizers(work.model, plan())


def test_the_linear_schedule_falls_to_nothing_from_the_end_of_the_warm_up() -> None:
    told = plan(steps=10, warmup=2, schedule="linear")
    assert [round(rate(told, step), 3) for step in range(10)] == [
        0.5,
        1,
        1,
        0.875,
        0.75,
        0.625,
        0.5,
        0.375,
        0.25,
        0.125,
    ]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("accumulate", 0),
        ("keep", 0),
        ("lr", 0.0),
        ("matrix_lr", math.nan),
        ("clip", math.inf),
        ("warmup", -1),
        ("weight_decay", -0.1),
        ("optimizer", "sgd"),
        ("schedule", "step"),
        ("decay", 1.5),
        ("betas", (0.9, 1.0)),
    ],
)
def test_a_plan_that_cannot_train_is_refused(field: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=f"{field} must be"):
        plan(**{field: value})


def test_the_bar_fits_80_columns() -> None:
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=True, color_system=None)
    with progress("a-distillation-with-a-long-name", 200_000, console) as show:
        show(123_456, {"loss": 1.2345, "validation_loss": 2.3456, "speed.ttft_ms.p50": 3.0})
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    last = [line for line in shown.replace("\r", "\n").splitlines() if "123456/200000" in line][-1]
    assert "loss 1.234" in last or "loss 1.235" in last
    assert "val 2.346" in last
    assert len(last.rstrip()) <= 80


def test_tensorboard_files_hold_the_log_s_figures(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    fit(Line(), plan(steps=3, tensorboard=True), tmp_path)
    found = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    lines = read_log(tmp_path / "log.jsonl")
    assert [event.step for event in found.Scalars("loss")] == [1, 2, 3]
    assert [event.value for event in found.Scalars("loss/fit")] == pytest.approx(
        [line["loss.fit"] for line in lines], abs=1e-5
    )


def test_without_tensorboard_a_word_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert fit(Line(), plan(steps=2, tensorboard=True), tmp_path).name == "step-2"
    assert "pip install 'dfastllm[train]'" in capsys.readouterr().err
    assert not (tmp_path / "tensorboard").exists()


def test_numbers_that_json_lacks_are_words(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    state = {"step": 1, "tokens": 2, "samples": 3, "seconds": 0.5}
    log.line(state, {"a": math.inf, "b": -math.inf, "c": math.nan, "d": 1.23456789, "e": 1.23456789e-5, "f": "word"})
    line = json.loads((tmp_path / "log.jsonl").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert [line[k] for k in "abcdef"] == ["Infinity", "-Infinity", "NaN", 1.23457, 1.23457e-05, "word"]
    assert latest(tmp_path) is None
