"""Which answers are learnt from."""

from __future__ import annotations

import json
import random

import pytest

from dfastllm.distill.teacher.answer import read_answer
from dfastllm.distill.teacher.judge import KEEPABLE, REASONS, is_garbage, loops, rejection
from dfastllm.tasks import draw
from tests.distill.teacher.mock_teacher import completion

PROSE = (
    "The river rises in the hills above the town and runs west for forty miles before it meets the sea. "
    "In spring it floods the lower meadows, and the farmers move their sheep to the ridge until the water falls. "
    "Nobody has built on the meadows since the great flood, although the soil there is the best in the county. "
    "A narrow bridge of grey stone crosses it near the mill, and beside the bridge stands an inn with a blue door."
)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (completion("Fine."), None),
        (completion("", calls=[("f", '{"a": 1}')], reason="tool_calls"), None),
        (completion("Fi", reason="length"), "length"),
        (completion("Fi", reason=None), "unfinished"),
        (completion("Fi", reason="content_filter"), "content_filter"),
        (completion("Fi", reason="error"), "finish_other"),
        (completion(" \n"), "empty"),
        (completion(None), "empty"),
        (completion(None, calls=[("f", '{"a": ')], reason="tool_calls"), "broken_call"),
        (completion(None, calls=[("f", "[1]")], reason="tool_calls"), "broken_call"),
        (completion(None, calls=[("g", "{}")], reason="tool_calls"), "unknown_tool"),
        (completion("\ufffd\ufffdx\x00"), "garbage"),
        (completion("half \ud83d of a pair " * 50), "garbage"),
        (completion(None, calls=[("f", json.dumps({"a": "\ufffd\ufffd"}))], reason="tool_calls"), "garbage"),
        (completion("Well. " + "and so on " * 9), "repeats"),
        (completion(None, calls=[("f", json.dumps({"a": "ha " * 40}))], reason="tool_calls"), "repeats"),
    ],
)
def test_the_reason(answer: dict[str, object], reason: str | None) -> None:
    assert rejection(read_answer(answer), {"f"}) == reason
    assert reason is None or reason in REASONS


def test_reasons_that_reject_nothing() -> None:
    """An answer that was cut, or goes round in circles, is kept where that is asked for; other rules hold for it."""
    cut, circles = completion("Well, and", reason="length"), completion("Well. " + "and so on " * 9)
    assert rejection(read_answer(cut), set(), {"length"}) is None
    assert rejection(read_answer(cut), set(), {"repeats"}) == "length"
    assert rejection(read_answer(circles), set(), {"repeats"}) is None
    assert rejection(read_answer(circles), set(), {"length"}) == "repeats"
    both = completion("Well. " + "and so on " * 9, reason="length")
    assert rejection(read_answer(both), set(), {"length"}) == "repeats"
    assert rejection(read_answer(both), set(), KEEPABLE) is None
    for answer, reason in (
        (completion("", reason="length"), "empty"),
        (completion("\ufffd\x00", reason="length"), "garbage"),
    ):
        assert rejection(read_answer(answer), set(), KEEPABLE) == reason


def brute_force_circle(text: str) -> bool:
    """Some piece stands four times or more at the end, over 64 characters or more."""
    text = text.rstrip()[-4096:]
    for size in range(64, len(text) + 1):
        tail = text[len(text) - size :]
        for period in range(1, size // 4 + 1):
            if all(tail[i] == tail[i + period] for i in range(size - period)):
                return True
    return False


@pytest.mark.parametrize("seed", range(60))
def test_loops_at_the_end_are_found_as_by_trying_all(seed: int) -> None:
    rng = random.Random(seed)
    piece = "".join(rng.choice("ab \n.") for _ in range(rng.randint(1, 30)))
    text = PROSE[: rng.randint(0, 60)] + piece * rng.randint(1, 8) + piece[: rng.randint(0, len(piece))]
    assert loops(text) == brute_force_circle(text)


def test_a_loop_that_counts_is_found_and_prose_is_none() -> None:
    counting = " ".join(f"After that we go on to step {n} and then we rest a while." for n in range(12))
    assert not brute_force_circle(counting)
    assert not loops(counting)  # of its phrases of eight words too many are new: a list that goes on is no loop
    circling = " ".join(f"{n % 3}, and after that we all go on to the next house of the road." for n in range(12))
    assert loops(circling)
    assert not loops(PROSE)
    assert not loops(PROSE + " " + PROSE[: len(PROSE) // 2])  # a part said twice
    assert loops(f"{PROSE} {PROSE} {PROSE}")


def test_a_long_text_is_judged_in_time() -> None:
    assert not loops("".join(random.Random(0).choices("ab ", k=200_000)))


def test_no_answer_of_the_task_mix_is_rejected() -> None:
    for index in range(300):
        sample = draw("train", 0, index)
        assert not loops(sample.response), sample.response
        assert not is_garbage(sample.response), sample.response
    assert not is_garbage("Ünïcode, 日本語, emoji 👩‍👩‍👧, tabs\tand\nlines\r\n")
