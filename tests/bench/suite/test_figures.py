"""Figures from answers whose times are written by hand."""

from __future__ import annotations

import math
import statistics

import pytest

from dfastllm.bench.suite.client import Answer, Chunk
from dfastllm.bench.suite.figures import Measured, block_seconds, figures, first_call, gaps, latency, token_gaps
from dfastllm.bench.suite.run import accuracy_vs_parallelism
from dfastllm.bench.suite.schema import Accuracy, ConfigurationResult, Figures, Forwards, Output, Speed
from dfastllm.bench.suite.sweep import compare
from dfastllm.bench.suite.workloads import Prompt
from dfastllm.metrics.stats import wilson

OPEN = Prompt("open/0", "open", ({"role": "user", "content": "?"},))


def asks(expected: str, id: str) -> Prompt:
    return Prompt(id, "closed", OPEN.messages, grader="contains", expected=expected)


def answer(times: list[float], tokens: list[int | None], text: str = "yes", **more: object) -> Answer:
    made = Answer(0.0, first=times[0], last=times[-1], end=times[-1], text=text)
    made.chunks = [Chunk(at, 3, count) for at, count in zip(times, tokens, strict=True)]
    if all(count is not None for count in tokens):
        made.completion_tokens = sum(count or 0 for count in tokens)
        made.tokens_source = "usage"
    for name, value in more.items():
        setattr(made, name, value)
    return made


def test_latency_is_linear_percentiles_in_ms() -> None:
    """The specification's case: 100, 150, 200 give p50 150 and p95 195; what is not finite does not count."""
    made = latency([0.1, 0.15, None, math.inf, 0.2])
    assert made is not None
    assert (made.p50, made.p95, made.n) == (pytest.approx(150), pytest.approx(195), 3)
    assert made.mean == pytest.approx(150)
    assert made.std == pytest.approx(statistics.pstdev([100, 150, 200]))
    assert latency([None]) is None


def test_gaps_between_chunks_and_between_tokens() -> None:
    """Chunks of 1, 2 and 4 tokens at 0.1, 0.3 and 0.7 s."""
    a = answer([0.1, 0.3, 0.7], [1, 2, 4])
    assert gaps(a) == pytest.approx([0.2, 0.4])
    assert token_gaps(a) == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.1, 0.1])
    assert a.tpot == pytest.approx(0.6 / 6)


def test_chunks_without_tokens_make_no_gap() -> None:
    """A call's beginning beside the token that told it, at 0.2 s: the next token's gap counts from the token before."""
    assert token_gaps(answer([0.1, 0.2, 0.4], [1, 0, 1])) == pytest.approx([0.3])


def test_gaps_between_tokens_need_the_tokens_of_a_chunk() -> None:
    unknown = answer([0.1, 0.3], [None, None], completion_tokens=5, tokens_source="usage")
    assert token_gaps(unknown) == []
    one_each = answer([0.1, 0.3], [None, None], completion_tokens=2, tokens_source="usage")
    assert token_gaps(one_each) == pytest.approx([0.2])


def test_blocks_end_with_the_chunk_that_completes_them() -> None:
    """Ten tokens in blocks of four: the first two end with the second chunk of five, the rest at the end."""
    assert block_seconds(answer([0.2, 0.5, 0.9], [3, 5, 2]), 4) == pytest.approx([0.5, 0.0, 0.4])
    assert block_seconds(answer([0.2, 0.5], [4, 4]), 4) == pytest.approx([0.2, 0.3])
    assert block_seconds(answer([0.2], [None]), 4) == []
    assert block_seconds(answer([0.2], [4]), None) == []


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"), [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634)]
)
def test_wilson_interval(correct: int, n: int, low: float, high: float) -> None:
    """Values of Wilson's interval as tables give them."""
    assert wilson(correct, n) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_throughput_goodput_and_errors() -> None:
    """Two good answers of 5 tokens in 2 s, one failure: its tokens count in nothing."""
    quick, slow = answer([0.1, 0.5], [1, 4]), answer([0.6, 1.6], [1, 4])
    bad = answer([0.1, 0.2], [1, 99], error="timeout")
    made = figures([Measured(OPEN, a) for a in (quick, slow, bad)], 2.0, slo={"ttft": 200, "tpot": 150})
    speed = made.speed
    assert (speed.requests, speed.errors, speed.error_kinds) == (2, 1, {"timeout": 1})
    assert (speed.output_tokens, speed.output_throughput, speed.request_throughput) == (10, 5.0, 1.0)
    assert speed.request_goodput == 0.5  # the slow one missed ttft and tpot
    assert speed.ttft is not None
    assert speed.ttft.n == 2
    assert speed.user_tps == pytest.approx(statistics.median([4 / 0.4, 4 / 1.0]))
    assert made.accuracy is None


def test_unknown_tokens_are_not_zero() -> None:
    made = figures([Measured(OPEN, answer([0.1], [None]))], 1.0)
    assert made.speed.output_tokens is None
    assert made.speed.output_throughput is None
    assert made.speed.tpot is None
    assert made.speed.itl is None


def test_a_question_asked_twice_is_graded_once() -> None:
    rows = [(asks("yes", "a"), "yes"), (asks("yes", "a"), "yes"), (asks("no", "b"), "yes"), (OPEN, "?")]
    made = figures([Measured(p, answer([0.1], [1], text)) for p, text in rows], 1.0)
    assert made.accuracy is not None
    assert (made.accuracy.n, made.accuracy.correct, made.accuracy.value) == (2, 1, 0.5)


def test_speculation_is_summed_over_answers() -> None:
    told = [
        {"drafts": 2, "draft_tokens": 6, "accepted_tokens": 3, "accepted_per_position": [2, 1], "nfe": 3},
        {"drafts": 1, "draft_tokens": 5, "accepted_tokens": 4, "accepted_per_position": [1, 1, 1, 1], "nfe": 2},
        {"nfe": 5, "exactness": "reference"},
    ]
    made = figures([Measured(OPEN, answer([0.1, 0.2], [1, 4], vendor=v)) for v in told], 1.0)
    spec = made.speculation
    assert spec is not None
    assert (spec.num_drafts, spec.num_draft_tokens, spec.num_accepted_tokens) == (3, 11, 7)
    assert spec.accepted_per_position == (3, 2, 1, 1)
    assert spec.acceptance_rate == pytest.approx(7 / 11)
    assert spec.acceptance_length == pytest.approx(1 + 7 / 3)
    assert made.forwards == Forwards(nfe=10 / 3, tokens_per_forward=1.5)
    assert made.exactness == {"reference": 1}


def test_equality_by_tokens_or_by_text() -> None:
    same, other = answer([0.1], [1], token_ids=[1, 2]), answer([0.1], [1], token_ids=[1, 3])
    made = figures([Measured(OPEN, same, baseline=same), Measured(OPEN, other, baseline=same)], 1.0)
    assert made.equality is not None
    assert (made.equality.compared, made.equality.equal, made.equality.by) == (2, 1, "tokens")
    text = figures([Measured(OPEN, answer([0.1], [1]), baseline=answer([0.2], [1]))], 1.0)
    assert text.equality is not None
    assert (text.equality.equal, text.equality.by) == (1, "text")


@pytest.mark.parametrize(
    ("over", "verdict"),
    [
        ([120, 121, 122, 120, 121, 119], "faster"),
        ([80, 81, 82, 80, 81, 79], "slower"),
        ([101, 99, 100, 100, 101, 99], "same"),
        ([70, 140, 80, 130, 100, 90], "no verdict"),
        # Five on one side by chance: one in sixteen for each of the two sides and every configuration.
        ([107, 111, 116, 108, 110], "no verdict"),
        ([107, 111, 116, 108, 110, 99], "no verdict"),
        ([150, 150], "no verdict"),
    ],
)
def test_verdicts(over: list[float], verdict: str) -> None:
    made = compare(over, [100.0] * len(over), 0.05)
    assert made.verdict == verdict
    assert made.ratio == pytest.approx(statistics.median(over) / 100)
    assert made.rounds == tuple(value / 100 for value in over)


def test_area_under_accuracy_and_parallelism() -> None:
    """Points (1, 0.8), (2, 0.9), (4, 0.5): at 1 the 0.9 of 2 counts; the area is 1 * 0.9 + 2 * 0.7."""

    def point(name: str, per_forward: float, accuracy: float) -> ConfigurationResult:
        speed = Speed(requests=1, duration=1.0, request_throughput=1.0)
        output = Output(mean_tokens=1.0, mean_characters=1.0, empty=0, repetition=0.0, finish_reasons={})
        right = Accuracy(n=10, correct=round(10 * accuracy), value=accuracy, low=0.0, high=1.0)
        forwards = Forwards(nfe=1.0, tokens_per_forward=per_forward)
        found = Figures(speed=speed, output=output, accuracy=right, forwards=forwards)
        return ConfigurationResult(name=name, label=name, axis="diffusion", status="measured", figures=found)

    made = accuracy_vs_parallelism([point("c", 4.0, 0.5), point("a", 1.0, 0.8), point("b", 2.0, 0.9)])
    assert made is not None
    assert [p.configuration for p in made.points] == ["a", "b", "c"]
    assert made.area == pytest.approx(0.9 + 1.4)
    assert made.mean_accuracy == pytest.approx(2.3 / 3)
    assert accuracy_vs_parallelism([]) is None


TOOL = {
    "type": "function",
    "function": {
        "name": "set_timer",
        "parameters": {"type": "object", "properties": {"minutes": {"type": "integer"}}, "required": ["minutes"]},
    },
}


@pytest.mark.parametrize(
    ("name", "arguments", "at"),
    [
        ("set_timer", '{"minutes": 5}', 0.4),
        ("set_timer", '{"minutes": "five"}', None),
        ("set_timer", "{}", None),
        ("other", '{"minutes": 5}', None),
        ("set_timer", '{"minutes": 5', None),
    ],
)
def test_a_tool_call_counts_when_it_fits_its_schema(name: str, arguments: str, at: float | None) -> None:
    prompt = Prompt("t", "tools", OPEN.messages, (TOOL,), wants_call=True)
    parsed = answer([0.1, 0.4], [1, 1], text="", call_at=0.4, tool_calls=[{"name": name, "arguments": arguments}])
    assert first_call(prompt, parsed) == at


def test_a_tool_call_in_the_text_is_found_with_its_last_character() -> None:
    """For servers that parse no calls: five chunks, the fourth closes the markup."""
    prompt = Prompt("t", "tools", OPEN.messages, (TOOL,), wants_call=True)
    pieces = ["<tool_call>", '{"name": "set_timer", ', '"arguments": {"minutes": 5}}', "</tool_call>", " ok"]
    made = answer([0.1, 0.2, 0.3, 0.4, 0.5], [1] * 5, text="".join(pieces))
    made.chunks = [Chunk(c.at, len(piece), 1) for c, piece in zip(made.chunks, pieces, strict=True)]
    assert first_call(prompt, made) == 0.4
    found = figures([Measured(prompt, made)], 1.0).speed.ttfa
    assert found is not None
    assert found.p50 == pytest.approx(400)


@pytest.mark.parametrize(("slo", "met"), [({"tpot": 99}, 0.5), ({"tpot": 101}, 1.0), ({"tpot": 1}, 0.5), ({}, None)])
def test_goodput_holds_every_limit(slo: dict[str, float], met: float | None) -> None:
    """5 tokens, 0.1 s between them; an answer of one token has no time between tokens, and meets that limit."""
    many, one = answer([0.1, 0.5], [1, 4]), answer([0.1], [1])
    assert figures([Measured(OPEN, a) for a in (many, one)], 2.0, slo=slo).speed.request_goodput == met


@pytest.mark.parametrize(("texts", "correct"), [(("yes", "no"), 1), (("no", "yes"), 0)])
def test_the_first_answer_of_a_question_counts(texts: tuple[str, str], correct: int) -> None:
    made = figures([Measured(asks("yes", "a"), answer([0.1], [1], text)) for text in texts], 1.0)
    assert made.accuracy is not None
    assert (made.accuracy.n, made.accuracy.correct) == (1, correct)
