"""Recorded runs replay on every runner: the recorded bits on the native kernels, at any number of threads; on torch,
and on another instruction set, logits within 1e-4."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from dfastllm import models
from dfastllm.core import Request, SamplingParams
from dfastllm.decode.registry import CACHES, RULES
from dfastllm.engine import Engine, EngineConfig
from dfastllm.engine.runners import Runner, runner_for
from dfastllm.engine.runners.record import Recorder, Recording, difference, replay
from dfastllm.errors import ValidationError
from dfastllm.kernels import native, set_threads
from dfastllm.models import tiny
from tests.kit.device import DEVICE, NO_TRITON, runner_of
from tests.recorded.runs import SEED, SHAPE, Run, engine_of, record, requests, runs

RUNS = {run.family: run for run in runs()}
SLOTS = 192
INTERPRETED = {"llama": 2, "gemma2": 1, "llada2_moe": 1}  # steps: the interpreter takes seconds for each
THERE = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
DEVICES = [name for name, there in THERE.items() if there]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    yield
    set_threads(1)


def worst(recording: Recording, runner: Runner) -> tuple[float, bool]:
    """The largest difference of a logit, and whether all bits are the recorded ones."""
    most, steps = 0.0, 0
    for _, wanted, got in replay(recording, runner):
        assert got.shape == wanted.shape
        most = max(most, difference(wanted, got))
        steps += 1
    assert steps > 5
    return most, most == 0


@pytest.mark.parametrize("family", RUNS)
def test_native_gives_the_recorded_bits(family: str) -> None:
    run = RUNS[family]
    recording, model = Recording(run.path), run.model()
    module = native()
    for threads in (1, 2, 3):
        set_threads(threads)
        most, equal = worst(recording, runner_for(model, SLOTS, torch.float32, "cpu", 1, 16))
        assert most <= 1e-4
        if module is not None and module.isa() == recording.header["isa"]:
            assert equal, f"other bits than recorded at {threads} threads, by up to {most:.3g}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", RUNS)
def test_torch_gives_the_recorded_logits(family: str, device: str) -> None:
    run = RUNS[family]
    model = Run(family, native=False).model().to(device)
    most, _ = worst(Recording(run.path), runner_for(model, SLOTS, torch.float32, device, 16, 16))
    assert most <= 1e-4


@pytest.mark.parametrize("family", RUNS)
def test_triton_gives_the_recorded_logits(family: str) -> None:
    """By its twins on a CPU, by its kernels on a card."""
    runner = runner_of(Run(family, native=False).model(), "twins" if DEVICE.type == "cpu" else "kernels", SLOTS)
    most, _ = worst(Recording(RUNS[family].path), runner)
    assert most <= 1e-4
    assert runner.counts["eager"] == 0


@pytest.mark.skipif(NO_TRITON is not None or DEVICE.type != "cpu", reason="triton's interpreter")
@pytest.mark.parametrize("family", INTERPRETED)
def test_interpreted_kernels_give_the_recorded_logits(family: str) -> None:
    """The first steps; `scripts/gpu-check --part interpreter` runs all of all families."""
    run = RUNS[family]
    runner = runner_of(Run(family, native=False).model(), "kernels", SLOTS)
    steps = itertools.islice(replay(Recording(run.path), runner), INTERPRETED[family])
    assert max(difference(wanted, got) for _, wanted, got in steps) <= 1e-4


def test_the_runs_hold_everything() -> None:
    """Every family, kind of span, cache, rule and drafter: by what was asked for, and by what is in the steps."""
    asked: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    for run in RUNS.values():
        engine = engine_of(run)
        for request in requests(engine.info):
            try:
                engine.add(request)
            except Exception:
                continue
            decode, drafts = request.decode, request.speculative
            asked[f"rule {decode.rule}" if decode is not None else "rule none"] += 1
            asked[f"cache {decode.cache if decode is not None else None}"] += 1
            asked[f"method {drafts.method if drafts is not None else None}"] += 1
        for step, _ in Recording(run.path):
            for row0, row1, cached, own, *_, mask in step.spans.tolist():
                stored = bool((step.slot[row0:row1] >= 0).any())
                store = "none" if not cached else "scratch" if own and not stored else "stored"
                sees = np.diff((step.cached_limit + step.own_limit)[row0:row1])
                rows = "row" if not len(sees) else "causal" if (sees == 1).all() else "rows"
                seen[f"{store} {'shadows' if mask >= 0 else rows}"] += 1
                seen["nothing wanted"] += not ((step.want >= row0) & (step.want < row1)).any()
            seen["several spans"] += len(step.spans) > 1
    missing = {f"rule {name}" for name in RULES} | {f"cache {name}" for name in CACHES}
    missing |= {f"method {name}" for name in ("none", "ngram", "suffix", "draft_model", "diffusion", "self")}
    assert missing - set(asked) == set()
    kinds = {"none rows", "stored causal", "stored row", "stored rows", "scratch rows", "scratch shadows"}
    assert {name for name in kinds | {"several spans", "nothing wanted"} if not seen[name]} == set()
    assert {run.path.stem for run in RUNS.values()} == {path.stem for path in Path(__file__).parent.glob("*.steps")}


def test_a_run_is_recorded_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "run.steps"
    monkeypatch.setenv("DFASTLLM_RECORD_STEPS", str(target))
    engine = Engine(tiny("llama", seed=SEED, **SHAPE), config=EngineConfig(kv_tokens=128))
    engine.add(Request("a", (1, 2, 3), SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)))
    while engine.has_work:
        engine.step()
    files = [path for path in tmp_path.iterdir() if path.name.startswith("run.steps")]
    assert len(files) == 1
    recording = Recording(files[0])
    assert (recording.header["model"], recording.header["seed"]) == ("tiny-llama", SEED)
    assert sum(len(step.want) for step, _ in recording) == 4
    runner = runner_for(tiny("llama", seed=SEED, **SHAPE), 128, torch.float32, "cpu", 16, 16)
    most, _ = max((np.abs(a - b).max(), i) for i, (_, a, b) in enumerate(replay(recording, runner)))
    assert most <= 1e-5


def test_recording_again_gives_the_same_file(tmp_path: Path) -> None:
    """Nothing in a run depends on time or on what ran before."""
    run = RUNS["llada"]
    record(run, tmp_path / "a")
    record(run, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-3], "too early"),
        (lambda data: data[:-12], "too early"),
        (lambda data: data + b"more", "end mark"),
        (lambda data: data[:-4] + b"\x01\0\0\0", "end mark is of 1 steps"),
        (lambda data: data.replace(b'"kv": "float32"', b'"kv": 555555555'), "kv in its header must be str"),
        (lambda data: data[:-10000] + data[-9990:], r"checksum|does not fit|cut|another version|too early"),
        (lambda data: data.replace(b"steps 2", b"steps 1", 1), "no recorded run of this version"),
        (lambda data: b"", "no recorded run of this version"),
        (lambda data: data[:40], "too early"),
        (lambda data: data[:30] + b"\xff\xff\xff\x7f" + data[34:], "header"),
        (lambda data: data[:2000] + bytes([data[2000] ^ 1]) + data[2001:], "checksum"),
    ],
)
def test_a_damaged_file_is_named(damage, message: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "bad.steps"
    path.write_bytes(damage(RUNS["llama"].path.read_bytes()))
    with pytest.raises(ValidationError, match=message):
        list(Recording(path))


def test_cut_between_two_steps_is_named(tmp_path: Path) -> None:
    """Nothing but the end mark tells that later steps are missing."""
    data, recording = RUNS["llama"].path.read_bytes(), Recording(RUNS["llama"].path)
    at = recording._start
    words, values = np.frombuffer(data[at : at + 8], dtype="<u4").tolist()
    for end in (at, at + 12 + words + values):
        (tmp_path / "cut").write_bytes(data[:end])
        with pytest.raises(ValidationError, match="too early"):
            list(Recording(tmp_path / "cut"))
        (tmp_path / "cut").write_bytes(data[:end] + data[-12:])
        with pytest.raises(ValidationError, match="end mark"):
            list(Recording(tmp_path / "cut"))


def test_what_is_not_finite_is_a_difference() -> None:
    good = np.array([[1.0, 2.0], [3.0, 4.0]], dtype=np.float32)
    bad = good.copy()
    bad[1, 0] = np.nan
    assert difference(good, good.copy()) == 0
    assert difference(bad, bad.copy()) == 0
    assert difference(good, bad) == difference(bad, good) == np.inf
    assert difference(good, good + np.float32(0.5)) == 0.5


def test_the_replay_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says what it found and by its status whether the logits are the recorded ones."""
    from dfastllm.engine.runners import __main__ as command

    models.save(tiny("llama", seed=SEED, **SHAPE), tmp_path / "m")
    (tmp_path / "m" / "tokenizer.json").write_text(text_of_tokenizer(36))

    def status(file: Path, *more: str) -> int:
        monkeypatch.setattr("sys.argv", ["replay", str(file), "--model", str(tmp_path / "m"), *more])
        return command.main()

    file = RUNS["llama"].path
    assert status(file, "--runner", "torch") == 0
    assert status(file, "--runner", "torch", "--within", "0") in (0, 1)
    assert "steps" in capsys.readouterr().out
    assert status(RUNS["qwen3"].path) == 2
    assert "family" in capsys.readouterr().err
    assert status(tmp_path / "none") == 2


def text_of_tokenizer(vocab: int) -> str:
    from tokenizers import Tokenizer
    from tokenizers import models as kinds

    return Tokenizer(kinds.WordLevel({f"w{i}": i for i in range(vocab - 4)}, "w0")).to_str()


def test_another_model_or_block_size_is_named() -> None:
    recording = Recording(RUNS["llama"].path)
    other = runner_for(tiny("llama", vocab_size=40), SLOTS, torch.float32, "cpu", 16, 16)
    with pytest.raises(ValidationError, match="vocabulary of 36"):
        next(replay(recording, other))
    small = runner_for(Run("llama", native=False).model(), SLOTS, torch.float32, "cpu", 16, 8)
    with pytest.raises(ValidationError, match="blocks of 16"):
        next(replay(recording, small))
    few = runner_for(Run("llama", native=False).model(), 16, torch.float32, "cpu", 16, 16)
    with pytest.raises(ValidationError, match="of the step must be from"):
        list(replay(recording, few))


def test_a_recorder_is_the_runner_it_records(tmp_path: Path) -> None:
    runner = runner_for(models.tiny("llama"), 64, torch.float32, "cpu", 16, 16)
    recorder = Recorder(runner, tmp_path / "x")
    assert (recorder.info, recorder.block_size, recorder.cut_free) == (runner.info, 16, False)
