"""The attention record: both sides compute the same thing, and its numbers are of what ran."""

from __future__ import annotations

import pytest
import torch

from dfastllm.bench.attention import CASES, Case, calls, measure_attention

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
    torch.testing.assert_close(ours(1), expected, rtol=0, atol=0.05 if type == "bf16" else 1e-5)
    assert not torch.equal(expected, torch.cat([part.flatten(1) for part in theirs(0)]))  # type: ignore[attr-defined]


@pytest.mark.parametrize("case", [*SMALL, *CASES], ids=lambda case: f"{case.op}-{case.spans}x{case.rows}")
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
