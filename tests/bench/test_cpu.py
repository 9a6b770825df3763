"""CPU records: the statistics, the shapes' arithmetic, the wire with a fake peer, turns, rows and their tables."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dfastllm.bench.cpu.cases import AIMS, CASES, MIXTURE_CASES, aim_for
from dfastllm.bench.cpu.ceilings import Ceilings, floor_seconds, measure_ceilings
from dfastllm.bench.cpu.compare import Contest, Pace, finished, verdict
from dfastllm.bench.cpu.environment import PEERS, Environment, _with_vnni, default_cache
from dfastllm.bench.cpu.load import Foreign
from dfastllm.bench.cpu.records import Plan, named_cases
from dfastllm.bench.cpu.report import table, write_results
from dfastllm.bench.cpu.shapes import SHAPES, find_shape
from dfastllm.bench.cpu.turns import Turn, peer_burst, take_turns
from dfastllm.bench.cpu.wire import Peer, PeerError
from dfastllm.bench.faithful import Faithfulness
from dfastllm.errors import ValidationError
from dfastllm.metrics.records import write_record
from dfastllm.metrics.stats import Ratio, paired_ratio, summarise

FAKE = Path(__file__).parents[1] / "kit" / "fake_peer.py"
positive = st.floats(1e-6, 1e3)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1))
def test_summary_orders_its_quantiles(values: list[float]) -> None:
    got = summarise(values)
    assert got.n == len(values)
    assert got.least == min(values)
    assert got.least <= got.q1 <= got.median <= got.q3 <= max(values)
    below = sum(v <= got.median + 1e-9 * abs(got.median) for v in values)
    assert 2 * below >= len(values)


def test_summary_of_nothing_is_refused() -> None:
    with pytest.raises(ValidationError, match="at least one"):
        summarise([])


@given(st.lists(st.tuples(positive, positive), min_size=1, max_size=20))
def test_paired_ratio_is_scale_free_and_holds_its_median(pairs: list[tuple[float, float]]) -> None:
    over, under = (list(side) for side in zip(*pairs, strict=True))
    got = paired_ratio(over, under, draws=200)
    assert got.low <= got.median <= got.high
    assert min(a / b for a, b in pairs) <= got.low
    assert got.high <= max(a / b for a, b in pairs)
    doubled = paired_ratio([2 * v for v in over], under, draws=200)
    assert doubled.median == pytest.approx(2 * got.median)
    assert doubled.high == pytest.approx(2 * got.high)


def test_paired_ratio_survives_drift_that_hits_both_sides() -> None:
    """The machine becomes ten times slower during the run: the ratio of pairs does not care, that of medians would."""
    drift = np.linspace(1, 10, 9)
    got = paired_ratio(list(3.0 * drift), list(1.5 * drift))
    assert (got.median, got.low, got.high) == pytest.approx((2, 2, 2))


def test_bootstrap_interval_covers_the_true_ratio_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        noise = random.lognormal(0, 0.2, (2, 15))
        got = paired_ratio(list(2.0 * noise[0]), list(noise[1]), draws=400, seed=trial)
        hits += got.low <= 2.0 <= got.high
    assert 0.88 <= hits / 200 <= 1.0


@pytest.mark.parametrize(("over", "under"), [([], []), ([1.0], [1.0, 2.0]), ([1.0, 0.0], [1.0, 1.0])])
def test_paired_ratio_refuses_what_is_not_paired(over: list[float], under: list[float]) -> None:
    with pytest.raises(ValidationError, match="equally many positive"):
        paired_ratio(over, under)


@pytest.mark.parametrize(
    ("low", "median", "high", "want"),
    [(4.1, 4.5, 5, "met"), (3.9, 4.1, 5, "met?"), (3, 3.9, 4.1, "missed?"), (2, 3, 3.9, "missed")],
)
def test_verdict_says_when_the_interval_holds_the_aim(low: float, median: float, high: float, want: str) -> None:
    assert verdict(Ratio(median, low, high, 7), 4.0) == want
    assert verdict(Ratio(median, low, high, 7), None) == ""
    assert verdict(Ratio(median, low, high, 3), 4.0) == want.rstrip("?") + "?", "three turns decide nothing"


def test_shapes_have_the_sizes_they_are_named_after() -> None:
    millions = {name: shape.parameters / 1e6 for name, shape in SHAPES.items()}
    assert millions == pytest.approx(
        {"qwen2.5-0.5b": 494, "qwen2.5-1.5b": 1543, "llada-0.5b": 500, "llada-1b": 1000, "moe-a1b-4l": 1859}, rel=0.02
    )


@pytest.mark.parametrize("name", SHAPES)
def test_shape_arithmetic_agrees_with_a_built_model(name: str) -> None:
    import torch

    from dfastllm.models.checkpoint import skeleton

    shape = find_shape(name)
    config, info = shape.own()
    model = skeleton(config, info, torch.float32)
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    assert matrices == shape.parameters
    parts = {name: p.numel() for name, p in model.named_parameters() if p.ndim == 2}
    if shape.experts:  # those of a row
        parts |= {own: size * shape.chosen // shape.experts for own, size in parts.items() if ".experts." in own}
    one = sum(size for own, size in parts.items() if shape.tied or own != "embed.weight")
    assert shape.streamed(4 * matrices) == pytest.approx(4 * one, abs=4)
    assert shape.streamed(4 * matrices, 10**6) == pytest.approx(4 * (shape.body + shape.head), abs=4)
    assert shape.flops(1, 1, 0) == 2 * one
    assert info.kind == ("diffusion" if name.startswith("llada") else "ar")


def test_unknown_shape_is_refused_by_name() -> None:
    with pytest.raises(ValidationError, match=r"qwen9.*llada-1b"):
        find_shape("qwen9")
    with pytest.raises(ValidationError, match=r"known: llada-0\.5b, llada-1b"):
        find_shape("qwen2.5-0.5b", "llada")


def test_every_aim_is_of_a_case() -> None:
    assert all(case in CASES for aims in AIMS.values() for case in aims)
    assert aim_for("llama.cpp", "Q4_0", "decode, 16 concurrent") == 2.5
    assert aim_for("llama.cpp", "Q4_0", "block of 128, one row") is None
    assert set(MIXTURE_CASES) <= set(CASES)
    assert aim_for("pytorch", "w8g", "decode, batch 1", mixture=True) == 3.0
    assert aim_for("llama.cpp", "Q4_0", "prefill 512", mixture=True) is None
    assert [c.name for c in named_cases(["decode"])] == ["decode, batch 1", "decode, 16 concurrent"]


def test_floor_is_the_greater_of_reading_and_computing() -> None:
    ceilings = Ceilings(stream=40, f32=100, bf16=500, int8=1000)
    assert floor_seconds(ceilings, 4e9, 1e9) == (pytest.approx(0.1), "memory")
    assert floor_seconds(ceilings, 4e9, 1e12) == (pytest.approx(1.0), "compute")
    assert ceilings.best(Ceilings(50, 90, 600, 900)) == Ceilings(50, 100, 600, 1000)


def test_ceilings_are_measured() -> None:
    got = measure_ceilings(1, megabytes=8, size=128, tries=1)
    assert all(value > 0 for value in asdict(got).values())
    assert got.compute == max(got.f32, got.bf16, got.int8)


@pytest.fixture
def peer() -> Iterator[Peer]:
    with Peer(Path(sys.executable), [str(FAKE)]) as worker:
        yield worker


def test_wire_carries_results_past_what_the_worker_prints(peer: Peer) -> None:
    arguments = {"rows": 4, "cached": 0, "every_row": True, "grow": False}
    assert peer.call("forward", repeats=2, **arguments) == [4e-3, 4e-3]
    assert peer.call("undone", repeats=2) == ["step", "undo", "step", "undo"]


def test_wire_reports_a_failed_operation_and_goes_on(peer: Peer) -> None:
    with pytest.raises(PeerError, match="fail: ValueError: no such file"):
        peer.call("fail", text="no such file")
    with pytest.raises(PeerError, match="KeyError"):
        peer.call("fly")
    assert peer.call("concurrent", sequences=2, cached=0, repeats=1) == [2e-3]


def test_wire_reports_a_worker_that_ended_with_its_last_words(peer: Peer) -> None:
    with pytest.raises(PeerError, match=r"status 7.*out of luck"):
        peer.call("end", status=7)
    with pytest.raises(PeerError, match="ended"):
        peer.call("undone", repeats=1)


def test_peer_burst_spells_cases_as_operations(peer: Peer) -> None:
    assert peer_burst(peer, CASES["block of 32, all rows"])(3) == pytest.approx([32e-3] * 3)
    assert peer_burst(peer, CASES["decode, 16 concurrent"])(1) == pytest.approx([16e-3 + 128e-6])


def test_turns_interleave_in_alternating_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Foreign, "_foreign", lambda self: 0.0)  # a quiet machine
    calls: list[str] = []

    def burst(name: str, seconds: float) -> list[float]:
        calls.append(name)
        return [seconds, seconds, 100.0]  # the median does not care for the last

    turns = take_turns(
        {"ours": lambda n: burst("ours", 0.1), "peer": lambda n: burst("peer", 0.4)},
        [os.getpid()],
        rounds=4,
        seconds=0.2,
    )
    assert calls[:4] == ["ours", "ours", "peer", "peer"]  # warm-up and calibration
    assert calls[4:] == ["ours", "peer", "peer", "ours"] * 2
    assert [turn.seconds for turn in turns] == [{"ours": 0.1, "peer": 0.4}] * 4


def test_disturbed_turns_are_replaced_by_quieter_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = iter([0.0, 0.5, 0.01, 0.3, 0.02, 0.0])

    def leave(self: Foreign, *_: object) -> None:
        self.share = next(shares)

    monkeypatch.setattr(Foreign, "__exit__", leave)
    turns = take_turns({"a": lambda n: [0.01] * n}, [os.getpid()], rounds=3, spare=3, seconds=0.01)
    assert [turn.foreign for turn in turns] == [0.0, 0.01, 0.02]


def test_no_rounds_are_refused() -> None:
    with pytest.raises(ValidationError, match="rounds"):
        take_turns({"a": lambda n: [1.0]}, [], rounds=0)


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="counts in /proc/stat")
def test_own_work_is_not_foreign() -> None:
    def spin(pids: list[int]) -> float:
        with Foreign(pids) as others:
            end = time.monotonic() + 0.4
            while time.monotonic() < end:
                pass
        assert others.share is not None
        return others.share

    busy, own = spin([]), spin([os.getpid()])
    assert 0 <= own <= 1
    # Uncounted, this thread's own spinning is foreign: at least most of one core, unless the machine is overbooked.
    assert busy > 0.5 / (os.cpu_count() or 1)


def contest() -> Contest:
    return Contest(find_shape("qwen2.5-0.5b"), "llama.cpp", "Q8_0", "Q8_0", 500_000_000, 500_000_000, Pace())


def test_a_row_holds_ratios_by_turn() -> None:
    turns = [Turn({"ours": 0.01 * k, "peer": 0.05 * k, "made": 0.02 * k}, 0.01 * k) for k in (1, 2, 3)]
    row = contest().row(CASES["block of 32, all rows"], turns)
    assert asdict(row.ratio) == pytest.approx(asdict(Ratio(5, 5, 5, 3)))
    assert row.made_ratio.median == pytest.approx(2.5)
    assert (row.aim, row.verdict) == (4.0, "met?")
    assert (row.ours_seconds.median, row.peer_seconds.least) == pytest.approx((0.02, 0.05))
    assert (row.foreign, row.foreign_most) == pytest.approx((0.02, 0.03))
    assert row.flops == find_shape("qwen2.5-0.5b").flops(32, 32, 288)


def test_a_resumed_record_skips_what_it_has(tmp_path: Path) -> None:
    row = contest().row(CASES["decode, batch 1"], [Turn({"ours": 1.0, "peer": 1.0, "made": 1.0}, None)])
    done = finished([asdict(row)])
    plan = Plan(find_shape("qwen2.5-0.5b"), ["Q8_0"], list(CASES.values()), 1, tmp_path, Pace(), done)
    assert "decode, batch 1" not in [c.name for c in plan.left("llama.cpp", "Q8_0", "Q8_0")]
    assert len(plan.left("llama.cpp", "Q8_0", "Q8_0")) == len(CASES) - 1
    assert len(plan.left("llama.cpp", "Q4_0", "Q4_0")) == len(CASES)


def test_results_are_generated_from_the_records(tmp_path: Path) -> None:
    turns = [Turn({"ours": 0.02, "peer": 0.1, "made": 0.025}, 0.02)] * 3
    row = asdict(contest().row(CASES["block of 32, all rows"], turns))
    ceilings = Ceilings(40, 100, 500, 1000)
    context = {"threads": 2, "kernels": "avx512", "versions": {"llama_cpp_python": "1.2"}}
    path = tmp_path / "llama.cpp-qwen2.5-0.5b.json"
    write_record(path, "cpu llama.cpp", [row], shape="qwen2.5-0.5b", ceilings=asdict(ceilings), **context)
    ratio = asdict(Ratio(12.0, 11.0, 13.0, 3))
    sides = [{"side": "native, dual", "tokens": 128, "times_plain": ratio, "aim": 10.0, "verdict": "met"}]
    write_record(tmp_path / "diffusion.json", "cpu diffusion", sides, threads=2, kernels="avx512")
    (tmp_path / "other.json").write_text(json.dumps({"name": "overhead"}))
    ours = [
        {"format": name, "kl": kl, "agreement": 0.894, "tokens": 1718, "bytes": 1}
        for name, kl in (("w8", 0.0369), ("Q8_0, as stored", 0.0043))
    ]
    theirs = [
        {"peer": peer, "format": form, "kl": kl, "agreement": 0.9, "tokens": 1718}
        for peer, form, kl in (("llama.cpp", "Q8_0", 0.0044), ("pytorch", "bf16", 0.0011))
    ]
    write_record(tmp_path.parent / "fidelity.json", "fidelity", ours, model="a-model", peers=theirs)
    text = write_results(tmp_path).read_text()
    assert "| w8 | 36.9 | 89.4% |" in text
    assert "| llama.cpp, Q8_0 | 4.4 | 90.0% |" in text
    line = "| Q8_0 | 4.3 / 4.4 | block of 32, all rows | 20.0 (20.0–20.0) | 100.0 (100.0–100.0) | 1,600 / 320 | "
    assert line + "5.00" in text
    assert "4 met?" in text
    assert "| w8 | 36.9 / 1.1 | native, dual | 128 | less faithful | 10 |  |" in text  # torch's bf16 is nearer to float
    assert "overhead" not in text
    assert table([row], ceilings, "t", Faithfulness(None)).row_count == 1
    ours[1]["kl"] = 0.0054  # and a format that is further from float than the peer's gets both times and no ratio
    write_record(tmp_path.parent / "fidelity.json", "fidelity", ours, model="a-model", peers=theirs)
    text = write_results(tmp_path).read_text()
    assert line.replace("4.3 /", "5.4 /") + "less faithful | less faithful | 4 not judged |" in text


def test_a_mixture_is_shown_as_what_it_is(tmp_path: Path) -> None:
    """Its formats are known on no real model: the column says so, and the ratio stays, whatever dense models say."""
    mixture = Contest(find_shape("moe-a1b-4l"), "llama.cpp", "Q8_0", "Q8_0", 2 * 10**9, 2 * 10**9, Pace())
    turns = [Turn({"ours": 0.02, "peer": 0.1, "made": 0.025}, 0.02)] * 3
    row = asdict(mixture.row(CASES["decode, batch 1"], turns))
    context = {"threads": 2, "kernels": "avx512", "versions": {}, "ceilings": asdict(Ceilings(40, 100, 500, 1000))}
    path = tmp_path / "cpu" / "llama.cpp-moe-a1b-4l.json"
    write_record(path, "cpu llama.cpp", [row], shape="moe-a1b-4l", **context)
    known = {"format": "Q8_0, as stored", "kl": 0.9, "agreement": 0.1, "tokens": 9, "bytes": 1}
    theirs = {"peer": "llama.cpp", "format": "Q8_0", "kl": 0.1, "agreement": 0.9, "tokens": 9}
    write_record(tmp_path / "fidelity.json", "fidelity", [known], model="a-model", peers=[theirs])
    text = write_results(tmp_path / "cpu").read_text()
    assert "| Q8_0 | random weights | decode, batch 1 | 20.0 (20.0–20.0) | 100.0 (100.0–100.0) | 50 / 10 | 5.00" in text
    assert "1.5 met?" in text


def test_an_environment_is_made_once_and_its_failure_quoted(tmp_path: Path) -> None:
    made = Environment("fake", (), "print('checked')")
    python = made.ensure(tmp_path)
    log = tmp_path / "fake" / "install.txt"
    assert log.read_text() == "checked\n"
    log.unlink()
    assert made.ensure(tmp_path) == python
    assert not log.exists()  # nothing ran again
    broken = Environment("fake", (), "raise SystemExit('it does not import')")
    for _ in range(2):  # a failed environment is not taken for a finished one
        with pytest.raises(PeerError, match=r"(?s)failed; see .*install\.txt.*it does not import"):
            broken.ensure(tmp_path)


def test_the_peers_are_made_with_an_exact_torch_first() -> None:
    assert set(PEERS) == {"llama.cpp", "llama.cpp-avx2", "llama.cpp-avx-vnni", "openvino-genai", "vllm"}
    assert PEERS["vllm"].steps[0] == ("torch==2.13.0",)
    assert dict(PEERS["llama.cpp"].variables)["CMAKE_ARGS"] == "-DGGML_NATIVE=ON"
    lesser = dict(PEERS["llama.cpp-avx2"].variables)["CMAKE_ARGS"].split()
    assert {"-DGGML_NATIVE=OFF", "-DGGML_AVX512=OFF", "-DGGML_AVX2=ON"} <= set(lesser)
    own, stand_in = _with_vnni(True), _with_vnni(False)
    assert own["CMAKE_ARGS"].split() == [*lesser, "-DGGML_AVX_VNNI=ON"]
    assert stand_in["CMAKE_ARGS"].split() == lesser
    assert stand_in["CFLAGS"] == stand_in["CXXFLAGS"] == "-mavx512vl -mavx512vnni"
    assert dict(PEERS["llama.cpp-avx-vnni"].variables) in (own, stand_in)


def test_the_cache_directory_can_be_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BENCH_CACHE", str(tmp_path))
    assert default_cache() == tmp_path
    monkeypatch.delenv("BENCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache() == Path("/somewhere/dfastllm-bench")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["llama.cpp", "--format", "Q9"], "unknown format 'Q9'"),
        (["openvino", "--format", "Q8_0"], "known: int8, int4"),
        (["pytorch", "--case", "sleep"], "no case begins with"),
        (["diffusion", "--side", "none"], "unknown side 'none'"),
        (["llama.cpp", "--build", "sse"], "unknown build 'sse'; known: native, avx2, avx-vnni"),
        (["llama.cpp", "--avx2"], "ours runs avx512vl, the peer avx2: set DFASTLLM_ISA to avx2"),
    ],
)
def test_commands_refuse_what_they_do_not_know(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dfastllm.kernels.extension.describe", lambda: "avx512vl: DFASTLLM_ISA says so")
    from typer.testing import CliRunner

    from dfastllm.bench.cpu.commands import app

    done = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path)], env={"COLUMNS": "300", "TERM": "dumb"})
    assert done.exit_code == 2
    assert said in " ".join(done.output.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("low", "median", "high", "n", "said"),
    [
        (1.0, 1.1, 1.2, 5, "met"),
        (1.0, 1.1, 1.2, 4, "met?"),
        (0.9, 1.0, 1.2, 9, "met?"),
        (0.8, 0.9, 0.99, 9, "missed"),
        (0.8, 0.9, 1.0, 9, "missed?"),  # the interval holds the aim
    ],
)
def test_a_verdict_is_decided_where_the_interval_leaves_out_the_aim(
    low: float, median: float, high: float, n: int, said: str
) -> None:
    assert verdict(Ratio(median, low, high, n), 1.0) == said
