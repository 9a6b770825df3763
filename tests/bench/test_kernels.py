"""The kernel record: every op of it runs, and its figures follow from its times."""

from __future__ import annotations

import pytest

from dfastllm.bench import kernels
from dfastllm.bench.cpu.ceilings import Ceilings


def test_every_line_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SHAPES", ((128, 64), (64, 96)))
    monkeypatch.setattr(kernels, "VOCABULARY", (200, 64))
    monkeypatch.setattr(kernels, "STREAMED", 1e5)
    ceilings = Ceilings(stream=10.0, f32=20.0, bf16=40.0, int8=80.0)
    rows = [kernels.measure(work, ceilings, 0.0) for work in kernels.works(rows=(1, 3))]
    seen = {(row["op"], row["format"], row["rows"]) for row in rows}
    assert {("linear", f, m) for f in kernels.FORMATS for m in (1, 3)} <= seen
    assert {
        ("rms_norm + prepare", "w4g", 3),
        ("linear + swiglu + prepare", "bf16", 1),
        ("head_stats", "w8g", 3),
    } <= seen
    for row in rows:
        seconds = row["us"].median / 1e6
        assert row["us"].n >= 5
        assert row["times_torch"] == pytest.approx(row["torch_us"].median / row["us"].median)
        if row["op"] == "linear" and row["format"] == "f32":
            flops, size = 2 * row["rows"] * row["n"] * row["k"], 4 * row["n"] * row["k"]
            assert row["gflops"] * seconds == pytest.approx(flops / 1e9)
            assert row["gbps"] * seconds == pytest.approx(size / 1e9)
            assert row["of_bound"] * seconds == pytest.approx(max(size / 10e9, flops / 20e9))
            assert row["of_stream"] * seconds == pytest.approx(size / 10e9)
            assert row["bound"] == ("memory" if size / 10 > flops / 20 else "compute")
