"""test_results.json: written whole, read back the same, refused with a reason when it is not ours to read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dfastllm.bench.suite.schema import (
    STATISTICS,
    Environment,
    Latency,
    Results,
    Run,
    Speed,
    load_results,
    save_results,
)
from dfastllm.errors import ValidationError

LATENCY = Latency(mean=1.5, median=1.0, std=0.5, p50=1.0, p90=2.0, p95=3.0, p99=4.0, n=7)


def results() -> Results:
    return Results(
        started="2026-01-01T00:00:00Z",
        finished="2026-01-01T00:01:00Z",
        seconds=60.0,
        environment=Environment(
            hardware={"cpu": "x"}, profile_key="k", server_is_local=True, versions={"dfastllm": "1"}, commit=None
        ),
        run=Run(
            parts=("sweep",),
            prompt_types=("code",),
            requests=1,
            rounds=1,
            concurrency=1,
            max_tokens=8,
            temperature=0.0,
            seed=0,
            quick=True,
        ),
    )


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "test_results.json"
    save_results(results(), path)
    assert load_results(path) == results()
    assert [p.name for p in path.parent.iterdir()] == ["test_results.json"]
    data = json.loads(path.read_text())
    assert (data["schema"], data["schema_version"]) == ("dfastllm-bench", 1)


def test_latencies_are_flat_under_vllms_names() -> None:
    speed = Speed(requests=3, duration=1.0, request_throughput=3.0, ttft=LATENCY)
    flat = speed.model_dump()
    assert {flat[f"{name}_ttft_ms"] for name in STATISTICS} == {1.5, 1.0, 0.5, 2.0, 3.0, 4.0}
    assert flat["p95_ttft_ms"] == 3.0
    assert flat["n_ttft"] == 7
    assert not [name for name in flat if "tpot" in name]
    assert Speed.model_validate_json(speed.model_dump_json()) == speed


def test_no_number_is_infinite() -> None:
    with pytest.raises(ValueError, match="finite"):
        Speed(requests=1, duration=float("inf"), request_throughput=1.0)


def _change(**fields: Any) -> str:
    return json.dumps({**json.loads(results().model_dump_json(by_alias=True)), **fields})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (results().model_dump_json(by_alias=True)[:200], "cut short"),
        ("", "cut short"),
        (_change(schema="another"), "no result of `dfastllm bench`"),
        ("[1, 2]", "its schema is 'list'"),
        ('{"speed_metrics": {}}', "its schema is None"),
        (_change(schema_version=0), "Run the suite again"),
        (_change(schema_version=2), "newer dfastllm"),
        (_change(schema_version=None), "schema version None"),
        (_change(surprise=1), "surprise"),
        (_change(seconds="long"), "seconds"),
    ],
)
def test_files_that_cannot_be_read_say_why(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(ValidationError, match=words.replace("`", "`")) as raised:
        load_results(path)
    assert str(path) in str(raised.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="cannot be read"):
        load_results(tmp_path / "nothing.json")
