"""The attention record: both sides compute the same thing, and its numbers are of what ran."""

from __future__ import annotations

import pytest
import torch

from dfastllm.bench.attention import CASES, LONG, Case, calls, measure_attention, measure_long
from dfastllm.bench.cpu.ceilings import Ceilings

SMALL = (
    Case("decode", spans=3, rows=1, keys=37, causal=True, heads=4),
    Case("diffusion block", spans=2, rows=8, keys=40, causal=False, heads=4),
    Case("prefill", spans=1, rows=20, keys=50, causal=True, heads=4),
)


@pytest.mark.parametrize("type", ["f32", "bf16", "int8"])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.op)
def test_both_sides_agree(case: Case, type: str) -> None:
    ours, theirs, _ = calls(case, type)
    expected = torch.cat([part.flatten(1) for part in theirs(1)])  # type: ignore[attr-defined]
    torch.testing.assert_close(ours(1), expected, rtol=0, atol=1e-5 if type == "f32" else 0.05)
    assert not torch.equal(expected, torch.cat([part.flatten(1) for part in theirs(0)]))  # type: ignore[attr-defined]


@pytest.mark.parametrize("case", [*SMALL, *CASES, *LONG], ids=lambda case: case.shape)
def test_visible_pairs_are_counted(case: Case) -> None:
    assert case.pairs == int(case.step().cached_limit.sum())


def test_rows_of_the_record() -> None:
    rows = measure_attention(0.0, SMALL, ["f32"])
    assert [row["op"] for row in rows] == ["decode", "diffusion block", "prefill"]
    for row, case in zip(rows, SMALL, strict=True):
        assert row["seconds"].n >= 5
        assert row["gflops"] == pytest.approx(4 * case.pairs * 4 * 64 / row["seconds"].median / 1e9)
        assert row["gbps"] > 0
        assert row["times_torch"] == pytest.approx(row["torch_seconds"].median / row["seconds"].median)


def test_long_contexts_are_shares_of_the_ceilings() -> None:
    rows = measure_long(Ceilings(stream=20.0, f32=1.0, bf16=400.0, int8=1.0), 0.0, SMALL, ["bf16", "int8"])
    assert [(row["op"], row["kv"]) for row in rows[:2]] == [("decode", "bf16"), ("decode", "int8")]
    seconds = rows[0]["us"].median / 1e6
    assert rows[0]["of_bf16"] * 400.0 == pytest.approx(4 * 3 * 37 * 4 * 64 / seconds / 1e9)
    assert rows[0]["of_stream"] * 20.0 == pytest.approx(3 * 48 * 2 * 64 * 2 * 2 / seconds / 1e9)


def test_long_contexts_hold_what_the_aims_name() -> None:
    """Both lengths, one row, many sequences of one and a block, causal and full, with and without groups of heads."""
    assert {case.keys for case in LONG} == {4096, 16384}
    assert {(case.spans, case.rows) for case in LONG} == {(1, 1), (16, 1), (1, 32)}
    assert {case.causal for case in LONG if case.rows > 1} == {True, False}
    assert {case.heads // case.kv_heads for case in LONG} == {7, 4, 1}
