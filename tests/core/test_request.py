"""Every option is validated on construction, by name."""

from __future__ import annotations

from typing import Any

import pytest

from dfastllm.core import DecodeParams, FinishReason, ModelInfo, Request, SamplingParams, Span, Tier, Usage
from dfastllm.core.ends import Ends
from dfastllm.errors import DFastLLMError, ValidationError

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0), ("presence_penalty", 2.1), ("presence_penalty", NAN), ("frequency_penalty", -2.1),
        ("repetition_penalty", 0.0), ("repetition_penalty", INF), ("temperature", -0.1), ("temperature", NAN),
        ("temperature", INF), ("top_p", -0.1), ("top_p", 1.1), ("top_k", -2), ("min_p", -0.1), ("min_p", 1.1),
        ("max_tokens", 0), ("min_tokens", -1), ("temperature", "hot"), ("n", 1.5), ("top_k", True), ("ignore_eos", 1),
        ("logprobs", -1), ("logprobs", 21), ("stop", ("",)),
        ("logit_bias", {3: 101.0}), ("allowed_token_ids", ()),
    ],
)  # fmt: skip
def test_sampling_refuses(field: str, value: Any) -> None:
    with pytest.raises(ValidationError) as error:
        SamplingParams(**{field: value})
    assert error.value.param == field
    assert error.value.status == 400


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0), ("block_length", 0), ("threshold", 0.0), ("threshold", 1.1), ("factor", 0.0), ("factor", INF),
        ("cache", "some"), ("remasking", "best"),
    ],
)  # fmt: skip
def test_decode_refuses(field: str, value: Any) -> None:
    with pytest.raises(ValidationError) as error:
        DecodeParams(**{field: value})
    assert error.value.param == field


def test_request_refuses() -> None:
    with pytest.raises(ValidationError, match="at least one token"):
        Request("a", ())
    with pytest.raises(ValidationError, match="timeout"):
        Request("a", (1,), timeout=0.0)


def test_vllm_defaults() -> None:
    """The names and defaults users of vLLM know."""
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p) == (1, 1.0, 1.0, 0, 0.0)
    assert (params.max_tokens, params.min_tokens, params.logprobs, params.ignore_eos) == (None, 0, None, False)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.0, 0.0, 1.0)
    assert SamplingParams(stop="x").stop == ("x",)


def test_span_arithmetic() -> None:
    span = Span(4, (1, 2, 3), "full", "keep", shadows=((5, 9),))
    assert (span.stop, span.rows, span.stored) == (7, 4, 7)
    assert Span(4, (1,), "full", "scratch").stored == 0


def test_tokens_per_forward() -> None:
    assert Usage(3, 12, 4, "reference").tokens_per_forward == 3.0
    assert Usage(3, 0, 0, "reference").tokens_per_forward == 0.0


def test_every_error_has_its_http_face() -> None:
    todo, seen = [DFastLLMError], set()
    while todo:
        error = todo.pop()
        todo += error.__subclasses__()
        assert 400 <= error.status < 600
        assert error.code
        seen.add(error.code)
    assert {"model_not_found", "queue_full", "context_length_exceeded", "timeout"} <= seen


def test_an_answer_of_parts_is_as_exact_as_the_least_exact() -> None:
    assert [Tier.least([one, Tier.REFERENCE]) for one in Tier] == list(Tier)
    assert Tier.least([Tier.EXACT_FAST, Tier.APPROXIMATE, Tier.EXACT_DISTRIBUTION]) is Tier.APPROXIMATE
    assert Tier.least([Tier.EXACT_FAST, Tier.EXACT_DISTRIBUTION]) is Tier.EXACT_DISTRIBUTION


def test_what_nothing_was_counted_of_is_zero() -> None:
    usage = Usage(prompt_tokens=1, completion_tokens=0, forwards=0, exactness=Tier.REFERENCE)
    assert (usage.queue_s, usage.total_s, usage.first_token_s) == (0.0, 0.0, None)
    assert (usage.cached_tokens, usage.drafts, usage.draft_tokens, usage.accepted_tokens) == (0, 0, 0, 0)
    assert (usage.acceptance_length, usage.tokens_per_forward) == (None, 0.0)


def test_where_a_text_must_end() -> None:
    """After max_tokens, and in any case where the context leaves room for the suffix behind it."""
    model = ModelInfo("m", "f", "diffusion", 50, 64, 1, 1, 8, eos_ids=(2,), mask_id=3)
    for tokens, suffix, last in ((None, (), 64), (None, (5,) * 10, 54), (20, (5,) * 10, 30), (60, (5,) * 10, 54)):
        ends = Ends.of(Request("r", (7,) * 10, SamplingParams(max_tokens=tokens), suffix=suffix), model)
        assert ends.last == last
        assert ends.reason(last - 2, 9) is None
        assert ends.reason(last - 1, 9) is FinishReason.LENGTH
        assert ends.reason(last - 1, 2) is FinishReason.STOP
