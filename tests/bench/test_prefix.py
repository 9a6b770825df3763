"""The record of prefix sharing on a model of random weights: rows and hits are known before it runs."""

from __future__ import annotations

import pytest

from dfastllm.bench.prefix import Chat, Crowd, measure_prefix, workloads
from dfastllm.models import tiny


@pytest.mark.parametrize("together", [False, True])
def test_rows_of_a_crowd(together: bool) -> None:
    """Whole chunks of 16 on the torch backend. The earlier request computes the common 32 tokens and one more."""
    work = Crowd("crowd", requests=3, common=32, own=5, answer=4, together=together)
    row = measure_prefix(tiny("llama"), work, repeats=2, kv_tokens=512, prefill_chunk=16)
    assert row["same_tokens"]
    assert row["requests"] == 3
    assert (row["prompt_tokens"], row["cached_tokens"]) == (3 * 37, 3 * 32)
    assert row["rows_off"] == 3 * (37 + 3)
    assert row["rows_on"] == 3 * (5 + 3)
    assert row["first_token_ratio"].n == 2
    assert row["first_token_ms_on"].low > 0


def test_rows_of_a_chat() -> None:
    """Prompts of 26, 40 and 54 tokens: 16, 32 and 48 of them are whole chunks."""
    work = Chat("chat", turns=3, system=20, own=6, answer=8)
    row = measure_prefix(tiny("llama"), work, repeats=1, kv_tokens=512, prefill_chunk=16)
    assert row["same_tokens"]
    assert (row["prompt_tokens"], row["cached_tokens"]) == (26 + 40 + 54, 0 + 16 + 32)
    assert row["rows_off"] - row["rows_on"] == row["cached_tokens"]


def test_nothing_in_common_finds_nothing() -> None:
    work, limits = workloads(512)[-1]
    row = measure_prefix(tiny("llama", max_len=512), work, repeats=1, prefill_chunk=16, **limits)
    assert row["cached_tokens"] == 0
    assert row["rows_on"] == row["rows_off"]
    assert row["one_run_off"] == 1.0
