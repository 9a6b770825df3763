"""Whole runs against a server on a socket: every fault at once, stops of every kind, and going on afterwards."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dfastllm.distill.data.rows import RowFile
from dfastllm.distill.teacher.cache import AnswerCache
from dfastllm.distill.teacher.collect import collect
from dfastllm.distill.teacher.ledger import rejected_path
from dfastllm.distill.teacher.settings import TeacherSettings
from dfastllm.distill.teacher.summary import Summary
from dfastllm.errors import AuthenticationError, DataError, RateLimitError, StorageError, TeacherError
from dfastllm.text import Tokenizer
from tests.distill.teacher.conftest import OPENED
from tests.distill.teacher.mock_teacher import MockTeacher, Script, Step, fails, says
from tests.kit.served import byte_tokenizer

TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]


def write_prompts(path: Path, rows: list[Any]) -> Path:
    lines = [
        row if isinstance(row, str) else json.dumps({"prompt": row} if isinstance(row, list) else row) for row in rows
    ]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def numbered(path: Path, count: int) -> Path:
    return write_prompts(path, [{"id": f"q{n}", "prompt": f"Question {n}?"} for n in range(count)])


def settings(teacher: MockTeacher, **fields: Any) -> TeacherSettings:
    given = {"model": "mock", "backoff": 0.005, "backoff_most": 0.01, "timeout": 5, "top_logprobs": 0, **fields}
    return TeacherSettings.of({"base_url": teacher.url, **given})


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answers(out: Path) -> dict[str, str]:
    return {row["id"]: row["teacher_text"] for row in lines(out)[1:]}


def echo(question: str, attempt: int) -> Step:
    return says(f"To {question} yes.")


# question -> the steps of its attempts; the last one goes on
FAULTS: dict[str, list[Step]] = {
    "plain": [says("Fine.")],
    "429": [fails(429, Retry_After="0.01"), says("After a wait.")],
    "500": [fails(500), fails(500), says("After two.")],
    "reset": [Step("reset"), says("After a reset.")],
    "stall": [Step("stall"), says("After a stall.")],
    "half": [Step("half", body=b'{"choices": []}'), says("After half.")],
    "bad json": [Step(body=b"{"), says("After bad JSON.")],
    "html": [Step(body=b"<html>"), says("After a page.")],
    "empty": [says(""), says("After nothing.")],
    "always empty": [says("")],
    "garbage": [says("\ufffd\ufffd\x00\x01")],
    "truncated": [says("It is", reason="length")],
    "unfinished": [says("It is", reason=None)],
    "repeated": [says("So " + "it goes and " * 20)],
    "refused": [fails(400, "too long")],
    "down": [fails(503)],
    "call": [says(None, calls=[("look", "{}")], reason="tool_calls")],
    "cut call": [says('<tool_call>{"name": "look", "argum')],
    "wrong tool": [says(None, calls=[("jump", "{}")], reason="tool_calls")],
}


def faulty(question: str, attempt: int) -> Step:
    steps = FAULTS[question]
    return steps[min(attempt, len(steps) - 1)]


def test_every_fault_in_one_run(tmp_path: Path, bytes_tokenizer: Tokenizer) -> None:
    rows = [{"prompt": name, **({"tools": TOOLS} if "call" in name or "tool" in name else {})} for name in FAULTS]
    prompts = write_prompts(tmp_path / "prompts.jsonl", [*rows, "{", {"prompt": ""}, {"text": "no prompt"}])
    out = tmp_path / "out" / "answers.jsonl"
    with MockTeacher(faulty) as teacher:
        chosen = settings(teacher, attempts=3, timeout=0.3, concurrency=6)
        summary = collect(prompts, out, chosen, bytes_tokenizer, show=False)
        again = collect(prompts, out, chosen, bytes_tokenizer, show=False)
    good = lines(out)[1:]
    assert {row["prompt"]: row["teacher_text"] for row in good} == {
        "plain": "Fine.",
        "429": "After a wait.",
        "500": "After two.",
        "reset": "After a reset.",
        "stall": "After a stall.",
        "half": "After half.",
        "bad json": "After bad JSON.",
        "html": "After a page.",
        "empty": "After nothing.",
        "call": '<tool_call>{"name": "look", "arguments": {}}</tool_call>',
    }
    wanted = {"always empty": "empty", "garbage": "garbage", "truncated": "length", "unfinished": "unfinished"}
    wanted |= {"repeated": "repeats", "cut call": "broken_call", "wrong tool": "unknown_tool"}
    assert summary.rejected == Counter(wanted.values())
    assert [row["reason"] for row in lines(rejected_path(out))[1:]] == [
        wanted[name] for name in FAULTS if name in wanted
    ]
    assert summary.failed == {"refused": 1, "http_503": 1}
    assert summary.retried == {
        "http_429": 1,
        "http_500": 2,
        "reset": 2,
        "timeout": 1,
        "bad_json": 2,
        "empty": 3,
        "http_503": 2,
    }
    assert (summary.rows, summary.accepted, summary.stopped) == (19, 10, None)
    assert sum(summary.skipped.values()) == 3
    assert summary.without_logprobs == {"no_logprobs": 10}
    # the second run asks what has no answer, and nothing else
    assert (again.had, again.accepted, again.rejected) == (17, 0, {})
    assert again.failed == {"refused": 1, "http_503": 1}
    assert teacher.answered == {name: 1 + (name in ("bad json", "html", "empty")) for name in teacher.answered} | {
        "always empty": 3
    }
    assert [row["prompt"] for row in good] == [name for name in FAULTS if name in {r["prompt"] for r in good}]
    assert next(iter(RowFile(out))).teacher_text == "Fine."  # it is a set that can be read as one
    for line in summary.lines():
        assert line
    assert json.loads(json.dumps(summary.to_json()))["accepted"] == 10


def test_rows_keep_what_they_bring(tmp_path: Path, bytes_tokenizer: Tokenizer) -> None:
    talk = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Well?"}]
    rows = [
        {"id": "a", "prompt": talk, "task": "chat", "expected": "Yes.", "grader": "exact", "metadata": {"note": 1}},
        {"id": "b", "prompt": "Had?", "teacher_text": "Already.", "extra": 2},
        {"prompt": "Twice?"},
        {"prompt": "Twice?"},
    ]
    prompts, out = write_prompts(tmp_path / "p.jsonl", rows), tmp_path / "a.jsonl"
    with MockTeacher(echo) as teacher:
        summary = collect(prompts, out, settings(teacher), bytes_tokenizer, show=False)
    head, a, b, *twice = lines(out)
    assert head["__header__"]["teacher"]["model"] == "mock"
    assert "127.0.0.1" in head["__header__"]["teacher"]["base_url"]
    about = a["metadata"].pop("teacher")
    assert (about["finish_reason"], about["prompt_tokens"], about["completion_tokens"]) == ("stop", 10, 5)
    assert a == {**rows[0], "teacher_text": "To Well? yes."}
    assert (b["teacher_text"], b["metadata"]["extra"]) == ("Already.", 2)
    assert teacher.asked == {"Well?": 1, "Twice?": 1}  # one question is paid for once
    assert [row["teacher_text"] for row in twice] == ["To Twice? yes."] * 2
    assert twice[0]["id"] != twice[1]["id"]
    assert (summary.given, summary.accepted, summary.cached) == (1, 3, 1)


def test_conversations_are_sent_as_servers_take_them(tmp_path: Path, bytes_tokenizer: Tokenizer) -> None:
    """Chat templates take more: arguments as objects, calls without ids, results that name no call."""
    call = {"function": {"name": "look", "arguments": {"at": "é"}}}
    whole = {"id": "c9", "type": "function", "function": {"name": "look", "arguments": '{"at":1}'}}
    talk = [
        {"role": "user", "content": "Look."},
        {"role": "assistant", "content": None, "tool_calls": [call, whole, {"function": {"name": "look"}}]},
        {"role": "tool", "tool_call_id": "c9", "content": "a cat"},
        {"role": "tool", "content": "a dog"},
        {"role": "tool", "content": "a hen"},
        {"role": "user", "content": "And?"},
    ]
    prompts = write_prompts(tmp_path / "p.jsonl", [{"prompt": talk, "tools": [TOOLS[0]["function"]]}])
    with MockTeacher(echo) as teacher:
        collect(prompts, tmp_path / "a.jsonl", settings(teacher), bytes_tokenizer, show=False)
    body = teacher.bodies[0]
    assert body["tools"] == TOOLS
    assert body["messages"][1]["tool_calls"] == [
        {"id": "call_1_0", "type": "function", "function": {"name": "look", "arguments": '{"at": "é"}'}},
        whole,
        {"id": "call_1_2", "type": "function", "function": {"name": "look", "arguments": "{}"}},
    ]
    assert [turn["tool_call_id"] for turn in body["messages"][2:5]] == ["c9", "call_1_0", "call_1_2"]
    assert lines(tmp_path / "a.jsonl")[1]["prompt"] == talk


def test_the_file_is_the_same_however_the_answers_came(tmp_path: Path, bytes_tokenizer: Tokenizer) -> None:
    """At once or one after the other, in one run or cut off and gone on with, with faults or without."""
    prompts = numbered(tmp_path / "p.jsonl", 12)

    def odd(question: str, attempt: int) -> Step:
        return fails(500) if attempt == 0 and int(question.split()[1][:-1]) % 3 == 0 else echo(question, attempt)

    found = []
    for name, script, concurrency, limits in (
        ("one", echo, 1, [12]),
        ("many", odd, 8, [12]),
        ("cut", odd, 3, [5, 9, 12]),
    ):
        with MockTeacher(script) as teacher:
            for limit in limits:
                chosen = settings(teacher, concurrency=concurrency)
                collect(prompts, tmp_path / name / "a.jsonl", chosen, bytes_tokenizer, limit=limit, show=False)
        text = (tmp_path / name / "a.jsonl").read_text()
        found.append(text.replace(teacher.url, "URL"))
    assert found[0] == found[1] == found[2]
    assert found[0].count("\n") == 13


def test_as_many_at_once_as_were_asked_for(tmp_path: Path, bytes_tokenizer: Tokenizer) -> None:
    prompts = numbered(tmp_path / "p.jsonl", 20)
    with MockTeacher(echo, hold=lambda _: teacher.in_flight < 5 and len(teacher.bodies) < 20) as teacher:
        collect(prompts, tmp_path / "a.jsonl", settings(teacher, concurrency=5), bytes_tokenizer, show=False)
    assert teacher.most_in_flight == 5


RUN = """
import sys
from dfastllm.distill.teacher.cache import AnswerCache
from dfastllm.distill.teacher.collect import collect
from dfastllm.distill.teacher.settings import TeacherSettings
from tests.distill.teacher.conftest import OPENED
from tests.kit.served import byte_tokenizer
prompts, out, url = sys.argv[1:]
chosen = TeacherSettings.of({"base_url": url, "model": "mock", "top_logprobs": 0, "concurrency": 3})
print(collect(prompts, out, chosen, byte_tokenizer(OPENED), show=False).stopped, flush=True)
"""


def begin(prompts: Path, out: Path, teacher: MockTeacher) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(prompts), str(out), teacher.url],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for(condition: Any) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def cached(folder: Path) -> int:
    return len(list((folder / "teacher-cache").rglob("*.json")))


HELD = ("Question 4?", "Question 6?", "Question 7?")


def test_killed_in_the_middle_and_gone_on_with(tmp_path: Path, bytes_tokenizer: Tokenizer) -> None:
    """Three questions are under way when the process ends; those before are in the cache, and all but the line that
    waits for its turn in the file. No question is answered twice by the server."""
    prompts, out = numbered(tmp_path / "p.jsonl", 12), tmp_path / "a.jsonl"
    with MockTeacher(echo, hold=lambda question: question in HELD) as teacher:
        process = begin(prompts, out, teacher)
        wait_for(lambda: teacher.in_flight == 3 and cached(tmp_path) == 5)  # 0 1 2 3 5
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert list(answers(out)) == ["q0", "q1", "q2", "q3"]
        assert not teacher.answered.keys() & set(HELD)
        with out.open("ab") as file:
            file.write(b'{"id": "q4", "prompt": "Ques')  # a line that was torn off
        teacher.release.set()
        wait_for(lambda: teacher.in_flight == 0)
        summary = collect(prompts, out, settings(teacher, concurrency=3), bytes_tokenizer, show=False)
    assert set(teacher.answered.values()) == {1}
    assert answers(out) == {f"q{n}": f"To Question {n}? yes." for n in range(12)}
    assert list(answers(out)) == [f"q{n}" for n in range(12)]
    assert (summary.had, summary.cached, summary.sent, summary.stopped) == (4, 1, 7, None)


def test_an_interruption_waits_for_what_is_under_way(tmp_path: Path, bytes_tokenizer: Tokenizer) -> None:
    prompts, out = numbered(tmp_path / "p.jsonl", 12), tmp_path / "a.jsonl"
    with MockTeacher(echo, hold=lambda question: question in HELD) as teacher:

        def interrupt() -> None:
            wait_for(lambda: teacher.in_flight == 3 and cached(tmp_path) == 5)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
            teacher.release.set()

        thread = threading.Thread(target=interrupt)
        thread.start()
        summary = collect(prompts, out, settings(teacher, concurrency=3), bytes_tokenizer, show=False)
        thread.join()
        assert summary.stopped == "interrupted"
        assert list(answers(out)) == [f"q{n}" for n in range(8)]
        collect(prompts, out, settings(teacher), bytes_tokenizer, show=False)
    assert set(teacher.answered.values()) == {1}
    assert list(answers(out)) == [f"q{n}" for n in range(12)]


def test_a_key_that_is_wrong_ends_the_run_at_once(tmp_path: Path, bytes_tokenizer: Tokenizer) -> None:
    prompts, out = numbered(tmp_path / "p.jsonl", 30), tmp_path / "a.jsonl"

    def expires(question: str, attempt: int) -> Step:
        return fails(401) if int(question.split()[1][:-1]) >= 6 else echo(question, attempt)

    with MockTeacher(expires) as teacher:
        with pytest.raises(AuthenticationError, match="answered 401"):
            collect(prompts, out, settings(teacher, concurrency=2), bytes_tokenizer, show=False)
        assert sum(teacher.asked.values()) <= 8
        assert list(answers(out)) == [f"q{n}" for n in range(6)]
        teacher.script = echo
        collect(prompts, out, settings(teacher), bytes_tokenizer, show=False)
    assert set(teacher.answered.values()) == {1}
    assert len(answers(out)) == 30


@pytest.mark.parametrize("fault", [fails(503), fails(400, "no such field"), Step("reset")])
def test_a_teacher_that_is_down_is_given_up(tmp_path: Path, bytes_tokenizer: Tokenizer, fault: Step) -> None:
    prompts, out = numbered(tmp_path / "p.jsonl", 50), tmp_path / "a.jsonl"
    with MockTeacher(lambda question, attempt: fault) as teacher:
        chosen = settings(teacher, attempts=2, give_up_after=5, concurrency=2)
        with pytest.raises(TeacherError, match="no answer to 5 questions in a row"):
            collect(prompts, out, chosen, bytes_tokenizer, show=False)
        assert len(teacher.asked) <= 7
    assert answers(out) == {}
    nobody = TeacherSettings.of({"base_url": teacher.url, "model": "m", "attempts": 1, "give_up_after": 2})
    with pytest.raises(TeacherError, match="connect"):
        collect(prompts, out.with_name("b.jsonl"), nobody, bytes_tokenizer, show=False)


def test_failures_between_answers_end_nothing(tmp_path: Path, bytes_tokenizer: Tokenizer) -> None:
    def flaky(question: str, attempt: int) -> Step:
        return echo(question, attempt) if int(question.split()[1][:-1]) % 3 == 2 else fails(503)

    summary, _ = run_of(tmp_path, bytes_tokenizer, flaky, 15, attempts=1, concurrency=1, give_up_after=3)
    assert (summary.accepted, summary.failed, summary.stopped) == (5, {"http_503": 10}, None)


def test_refusals_of_single_questions_end_nothing(tmp_path: Path, bytes_tokenizer: Tokenizer) -> None:
    def long(question: str, attempt: int) -> Step:
        return echo(question, attempt) if question == "Question 0?" else fails(400, "too long")

    prompts = numbered(tmp_path / "p.jsonl", 30)
    with MockTeacher(long) as teacher:
        chosen = settings(teacher, concurrency=1, give_up_after=3)
        summary = collect(prompts, tmp_path / "a.jsonl", chosen, bytes_tokenizer, show=False)
    assert (summary.accepted, summary.failed) == (1, {"refused": 29})
    assert "q1: The teacher at" in summary.first_failure["refused"]


def run_of(
    tmp_path: Path, tokenizer: Tokenizer, script: Script, count: int, **fields: Any
) -> tuple[Summary, MockTeacher]:
    prompts = numbered(tmp_path / "p.jsonl", count)
    with MockTeacher(script) as teacher:
        summary = collect(prompts, tmp_path / "a.jsonl", settings(teacher, **fields), tokenizer, show=False)
    return summary, teacher


def test_a_spent_budget_ends_the_run_and_counts_what_was_there(tmp_path: Path, bytes_tokenizer: Tokenizer) -> None:
    """Each call takes 15 tokens by usage and may take its prompt and 5: the bound is on all answers of the file."""
    prompts, out = numbered(tmp_path / "p.jsonl", 20), tmp_path / "a.jsonl"
    with MockTeacher(echo) as teacher:
        for budget, most in ((100, 6), (100, 6), (200, 13)):
            chosen = settings(teacher, max_tokens=5, budget_tokens=budget, price_prompt=1.0, price_completion=2.0)
            summary = collect(prompts, out, chosen, bytes_tokenizer, show=False)
            assert summary.stopped is not None
            assert "budget does not reach" in summary.stopped
            done = len(answers(out))
            assert 0 < done <= most
            assert done == sum(teacher.answered.values())
            assert 15 * done <= budget < 15 * done + 60  # the next prompt has some 40 tokens
    assert summary.price == pytest.approx((10 * 1.0 + 5 * 2.0) * summary.accepted / 1e6)


def test_a_deadline_ends_the_run(tmp_path: Path, bytes_tokenizer: Tokenizer) -> None:
    summary, teacher = run_of(tmp_path, bytes_tokenizer, echo, 10, deadline=1e-9)
    assert summary.stopped == "deadline: 1e-09 s are over"
    assert (summary.accepted, sum(teacher.asked.values())) == (0, 0)


def test_what_is_answered_needs_no_teacher(
    tmp_path: Path, bytes_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on training with its answers goes on when the server is gone and its key is not set."""
    prompts, out = numbered(tmp_path / "p.jsonl", 3), tmp_path / "a.jsonl"
    monkeypatch.setenv("TEACHER_KEY", "k")
    with MockTeacher(echo) as teacher:
        chosen = settings(teacher, model="", api_key_env="TEACHER_KEY")
        collect(prompts, out, chosen, bytes_tokenizer, show=False)
    assert teacher.authorisations == {"Bearer k"}
    monkeypatch.delenv("TEACHER_KEY")
    before = out.read_bytes()
    assert collect(prompts, out, chosen, bytes_tokenizer, show=False).had == 3
    assert out.read_bytes() == before
    with pytest.raises(DataError, match="made otherwise"):
        collect(prompts, out, chosen.model_copy(update={"seed": 1}), bytes_tokenizer, show=False)


def test_a_server_that_wants_hours_ends_the_run(tmp_path: Path, bytes_tokenizer: Tokenizer) -> None:
    with pytest.raises(RateLimitError, match="asked again in 9999 s"):
        run_of(tmp_path, bytes_tokenizer, lambda q, a: fails(429, Retry_After="9999"), 5)


def test_answers_made_otherwise_are_not_mixed(tmp_path: Path, bytes_tokenizer: Tokenizer) -> None:
    prompts, out = numbered(tmp_path / "p.jsonl", 2), tmp_path / "a.jsonl"
    with MockTeacher(echo) as teacher:
        collect(prompts, out, settings(teacher), bytes_tokenizer, show=False)
        before = out.read_bytes()
        for change in ({"model": "other"}, {"temperature": 0.7}, {"max_tokens": 9}, {"options": {"top_p": 0.5}}):
            with pytest.raises(DataError, match="made otherwise: teacher differ"):
                collect(prompts, out, settings(teacher, **change), bytes_tokenizer, show=False)
        with pytest.raises(DataError, match="made otherwise: tokenizer differ"):
            collect(prompts, out, settings(teacher), byte_tokenizer(OPENED, ("<|x|>",)), show=False)
    assert out.read_bytes() == before
    assert sum(teacher.asked.values()) == 2


@pytest.mark.parametrize(
    "there", [b"my thesis", b'{"prompt": "x"}\n', b"\n", b'{"__header__": 3}\n', b'{"__header__": {}}\n']
)
def test_a_file_of_somebody_else_is_left_alone(tmp_path: Path, bytes_tokenizer: Tokenizer, there: bytes) -> None:
    prompts, out = numbered(tmp_path / "p.jsonl", 2), tmp_path / "a.jsonl"
    out.write_bytes(there)
    with MockTeacher(echo) as teacher:
        with pytest.raises(DataError, match=r"not written by this command|made otherwise"):
            collect(prompts, out, settings(teacher), bytes_tokenizer, show=False)
        assert out.read_bytes() == there
        assert not teacher.bodies


def test_a_head_that_was_torn_off_is_written_anew(tmp_path: Path, bytes_tokenizer: Tokenizer) -> None:
    prompts, out = numbered(tmp_path / "p.jsonl", 2), tmp_path / "a.jsonl"
    with MockTeacher(echo) as teacher:
        collect(prompts, out, settings(teacher), bytes_tokenizer, show=False)
        whole = out.read_bytes()
        out.write_bytes(whole[:40])
        collect(prompts, out, settings(teacher), bytes_tokenizer, show=False)
        assert out.read_bytes() == whole
        out.write_bytes(whole.replace(b'"digest"', b'"digits"'))
        with pytest.raises(DataError, match="a line that is no answer"):
            collect(prompts, out, settings(teacher), bytes_tokenizer, show=False)
    assert sum(teacher.asked.values()) == 2


def test_two_runs_do_not_write_to_one_file(tmp_path: Path, bytes_tokenizer: Tokenizer) -> None:
    prompts, out = numbered(tmp_path / "p.jsonl", 2), tmp_path / "a.jsonl"
    with MockTeacher(echo) as teacher, out.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another run writes answers"):
            collect(prompts, out, settings(teacher), bytes_tokenizer, show=False)


def test_a_disk_that_is_full_ends_the_run(
    tmp_path: Path, bytes_tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing more is asked once an answer cannot be kept."""

    def full(*_: object) -> None:
        raise StorageError("the disk is full.")

    prompts = numbered(tmp_path / "p.jsonl", 30)
    with MockTeacher(echo) as teacher:
        monkeypatch.setattr(AnswerCache, "put", full)
        with pytest.raises(StorageError, match="full"):
            collect(prompts, tmp_path / "a.jsonl", settings(teacher, concurrency=2), bytes_tokenizer, show=False)
    assert sum(teacher.asked.values()) <= 4


@pytest.mark.parametrize("rows", [[], ["{"], [{"prompt": ""}], [{"text": "x"}]])
def test_prompts_that_are_none(tmp_path: Path, bytes_tokenizer: Tokenizer, rows: list[Any]) -> None:
    prompts = write_prompts(tmp_path / "p.jsonl", rows)
    with MockTeacher(echo) as teacher:
        with pytest.raises(DataError, match="no prompt that can be used"):
            collect(prompts, tmp_path / "a.jsonl", settings(teacher), bytes_tokenizer, show=False)
        with pytest.raises(DataError, match="is not there"):
            collect(tmp_path / "none", tmp_path / "a.jsonl", settings(teacher), bytes_tokenizer, show=False)


def test_how_far_it_is_is_shown(tmp_path: Path, bytes_tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = numbered(tmp_path / "p.jsonl", 3)
    with MockTeacher(echo) as teacher:
        collect(prompts, tmp_path / "a.jsonl", settings(teacher), bytes_tokenizer)
    assert capsys.readouterr().err.splitlines()[-1] == "teacher 3/3  3 answers, 45 tokens"
