"""The speculation record: known figures from a drafter of known quality, and the plot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dfastllm import assemble
from dfastllm.bench.speculation import Oracle, break_even, engine_of, oracle, plot, speed, verify_costs
from dfastllm.core import Request, SamplingParams, SequenceState
from dfastllm.metrics.records import write_record
from dfastllm.metrics.speculation import answer, counts
from dfastllm.models import tiny


def test_break_even_is_where_expected_tokens_meet_the_cost() -> None:
    assert break_even(0, 1.0) == 0.0
    assert break_even(3, 0.9) == 0.0
    assert break_even(1, 1.25) == pytest.approx(0.25)
    assert break_even(3, 1 + 0.5 + 0.25 + 0.125) == pytest.approx(0.5)
    assert break_even(3, 4.0) == pytest.approx(1.0)
    assert break_even(3, 4.1) is None


def test_an_oracle_is_right_as_often_as_told() -> None:
    text = [i % 50 for i in range(4000)]
    for rate in (0.0, 0.3, 1.0):
        drafter = Oracle({"r": text}, rate, 50)
        request = Request("r", (1, 2), SamplingParams(max_tokens=5000))
        seq = SequenceState(request, tiny("llama").info, [1, 2], seed=0)
        (draft,) = drafter.propose([(seq, 4000)])
        right = sum(a == b for a, b in zip(draft.tokens, text, strict=True)) / 4000
        assert right == pytest.approx(rate, abs=0.03)
        seq.tokens += text[:7]
        assert drafter.propose([(seq, 3)])[0].tokens == draft.tokens[7:10]  # a function of the place alone


def test_the_parts_run_and_say_what_they_counted(tmp_path: Path) -> None:
    model = assemble.pack(tiny("llama", seed=2, vocab_size=96))
    rows = list(oracle(model, batches=(2,), rates=(1.0,), lengths=(3, None), tokens=21, repeats=1))
    assert rows[0]["accepted"] == 1.0
    assert rows[0]["acceptance_length"] == pytest.approx(40 / 10)  # 20 tokens by drafts of 3, and the one of the end
    assert rows[0]["tokens"] == 42
    costs = verify_costs(model, batches=(1,), lengths=(0, 3), steps=4)
    assert [r["k"] for r in costs] == [0, 3]
    assert costs[0]["ratio"] == 1.0
    assert all(r["step_s"].n == 4 for r in costs)
    measured = list(speed("suffix", batches=(1,), lengths=(3,), repeats=1))
    assert measured[0]["acceptance_length"] > 1
    record = {"oracle": rows, "verify": costs, "speed": measured, "oracle_model": "tiny"}
    write_record(tmp_path / "speculation.json", "speculation", record)
    plot(json.loads((tmp_path / "speculation.json").read_text())["results"], tmp_path / "speculation.png")
    assert (tmp_path / "speculation.png").stat().st_size > 10_000


def test_counts_are_of_the_forwards() -> None:
    engine = engine_of("ngram")
    run = answer(engine, [Request("r", (1, 20, 21, 22), SamplingParams(temperature=0, max_tokens=5))])
    found = counts(run)
    assert found["accepted"] is None
    assert found["drafted_share"] == 0
    assert found["forwards"] == run.usages["r"].forwards
