"""How faithful a format is, beside its speed: which ratios may be told, and what every table shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dfastllm.bench.cpu.report import faithful_rows
from dfastllm.bench.faithful import HEADING, LESS, RANDOM, UNKNOWN, Faithfulness, comparable
from dfastllm.bench.kernels import shown
from dfastllm.metrics.stats import Ratio

RECORD: dict[str, Any] = {
    "results": [
        {"format": "bf16", "kl": 0.0002},
        {"format": "w8", "kl": 0.0347},
        {"format": "w8r", "kl": 0.0056},
        {"format": "w4", "kl": 0.25},
        {"format": "Q8_0, as stored", "kl": 0.0043},
    ],
    "peers": [
        {"peer": "pytorch", "format": "bf16", "kl": 0.0011},
        {"peer": "openvino-genai", "format": "int8", "kl": 0.0064},
        {"peer": "llama.cpp", "format": "Q8_0", "kl": 0.0044},
    ],
}
KNOWN = Faithfulness(RECORD)


@pytest.mark.parametrize(
    ("ours", "peer", "fair"),
    [
        (0.005, 0.008, True),
        (0.008, 0.008, True),
        (0.0083, 0.008, True),  # 4 % apart: other texts change the order
        (0.0086, 0.008, False),
        (0.03, 0.008, False),
        (0.03, None, True),  # nothing is known against it
        (None, None, True),
        (None, 0.008, False),  # nothing is known for it
        (0.0, 0.0, True),
        (1e-9, 0.0, False),
    ],
)
def test_a_ratio_is_told_where_the_peer_is_not_more_faithful(ours: float, peer: float | None, fair: bool) -> None:
    assert comparable(ours, peer) is fair


def test_figures_are_found_under_the_names_that_records_use() -> None:
    assert KNOWN.ours("Q8_0") == 0.0043  # a file, run as it is stored
    assert KNOWN.ours("w4g") == 0.25  # the kernel of w4
    assert KNOWN.ours("f32") == 0
    assert KNOWN.ours("Q4_K_M") is None
    assert KNOWN.peer("vllm", "bf16") == KNOWN.peer("pytorch", "bf16") == 0.0011
    assert KNOWN.peer("llama.cpp-avx2", "Q8_0") == 0.0044
    assert KNOWN.both("w8r", "openvino-genai", "int8") == "5.6 / 6.4"
    assert KNOWN.both("w4", "openvino-genai", "int4") == f"250 / {UNKNOWN}"
    assert KNOWN.both("Q4_K_M", "llama.cpp", "Q4_K_M") == UNKNOWN


def test_a_mixture_has_no_real_model_to_be_measured_on() -> None:
    assert KNOWN.both("w8", "pytorch", "bf16", shape="moe-a1b-4l") == RANDOM
    assert KNOWN.may_compare("w8", "pytorch", "bf16", shape="moe-a1b-4l")
    assert not KNOWN.may_compare("w8", "pytorch", "bf16", shape="qwen2.5-0.5b")


def test_without_a_record_nothing_is_known_and_nothing_hidden(tmp_path: Path) -> None:
    nothing = Faithfulness.read(tmp_path)
    assert nothing.both("w8", "openvino-genai", "int8") == UNKNOWN
    assert nothing.may_compare("w8", "openvino-genai", "int8")
    (tmp_path / "fidelity.json").write_text(json.dumps(RECORD))
    assert not Faithfulness.read(tmp_path).may_compare("w8", "openvino-genai", "int8")


def test_rows_are_shown_with_the_column_and_without_unfair_ratios() -> None:
    ratio = Ratio(2.0, 1.9, 2.1, 7)
    rows = [
        {"side": "torch bf16, none", "times_plain": ratio, "aim": None, "verdict": ""},
        {"side": "native bf16, dual", "times_plain": ratio, "aim": 10, "verdict": "missed"},
        {"side": "native w8, dual", "times_plain": ratio, "aim": 10, "verdict": "missed"},
    ]
    plain, fair, unfair = faithful_rows("cpu diffusion", rows, KNOWN)
    assert (plain[HEADING], plain["times_plain"]) == ("1.1", ratio)
    assert (fair[HEADING], fair["times_plain"], fair["verdict"]) == ("0.2 / 1.1", ratio, "missed")
    assert (unfair[HEADING], unfair["times_plain"], unfair["verdict"]) == ("34.7 / 1.1", LESS, "")
    assert rows[2]["times_plain"] is ratio, "the record itself keeps it"

    served = [{"format": name, "ratio": ratio, "possible": 2.0, "of_possible": 1.0} for name in ("bf16", "w8r")]
    fair, unfair = faithful_rows("cpu vllm", served, KNOWN)
    assert fair == {**served[0], HEADING: "0.2 / 1.1"}
    assert unfair == {**served[1], HEADING: "5.6 / 1.1", "ratio": LESS, "possible": "", "of_possible": ""}
    assert list(unfair)[:2] == ["format", HEADING]
    assert faithful_rows("cpu neutral", served, KNOWN) == served


def test_a_kernel_is_set_against_what_torch_multiplies_with() -> None:
    rows = [
        {"format": name, "against": against, "times_torch": 3.0}
        for name, against in (
            ("f32", "linear, float32"),
            ("w4g", "linear, bfloat16"),
            ("w4g", "linear, bfloat16, then eager"),
            ("w8", "_int_mm without scales"),
            ("w4g", "the twin"),
        )
    ]
    got = [(row[HEADING], row["times_torch"]) for row in shown(rows, KNOWN)]
    assert got == [
        ("0 / 0", 3.0),
        ("250 / 1.1", LESS),
        ("250 / 1.1", LESS),
        (f"34.7 / {UNKNOWN}", 3.0),
        (f"250 / {UNKNOWN}", 3.0),
    ]


def test_rows_of_ours_have_the_column_behind_the_format_or_the_first() -> None:
    assert KNOWN.beside([{"case": "a", "format": "w8", "ms": 1}]) == [
        {"case": "a", "format": "w8", HEADING: "34.7", "ms": 1}
    ]
    [row] = KNOWN.beside([{"model": "demo", "ms": 1}], lambda row: "bf16")
    assert list(row.items()) == [("model", "demo"), (HEADING, "0.2"), ("ms", 1)]
