"""Trajectories: what the engine tells of its order, files of them, and the states drawn from them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dfastllm.core import CanvasUpdate, StepEvent
from dfastllm.distill.data.rows import check_row
from dfastllm.distill.students.trajectory import (
    Question,
    Trajectory,
    Transcript,
    masked_state,
    question_of,
    read_trajectories,
    record,
    window_size,
    write_trajectories,
)
from dfastllm.errors import DataError, UnsupportedError, ValidationError
from dfastllm.llm import LLM
from dfastllm.models.decoder import Decoder
from dfastllm.tasks import draw
from dfastllm.train.data import encode
from dfastllm.train.objectives import Line, canvas_rows, short_attention

SCHEDULE = {"rule": "schedule", "cache": "none"}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    """The torch runner in float32, so that a plain forward of ours gives its numbers."""
    with LLM("demo-diffusion", backend="torch", dtype="float32") as found:
        yield found


@pytest.fixture(scope="module")
def questions(llm: LLM) -> list[Question]:
    samples = [draw("test", 5, i, mix={"prose": 0.0, "instruct": 0.0}) for i in range(6)]
    examples = [encode(llm.tokenizer, sample) for sample in samples]
    return [
        Question(f"q{i}", sample.task, one.prompt, sample.grader, sample.expected, one.response)
        for i, (sample, one) in enumerate(zip(samples, examples, strict=True))
    ]


def confidence(llm: LLM, prompt: tuple[int, ...], canvas: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(probability, token) of the likeliest token at each position of a canvas, by one plain forward in float64."""
    model, shown = llm.engine.model, torch.tensor(canvas)
    assert isinstance(model, Decoder)
    everywhere = torch.ones(len(canvas), dtype=torch.bool)
    rows = canvas_rows([Line(prompt, shown, ~everywhere, everywhere, torch.ones(len(canvas)))], -1, -1)
    with torch.no_grad():
        logits = model.head(model(rows.ids, rows.positions, short_attention(rows))[rows.wanted]).double()
    logits[:, llm.info.mask_id] = -torch.inf
    sure, best = logits.softmax(-1).max(-1)
    return sure, best


def test_the_recorded_order_is_the_models_own(llm: LLM, questions: list[Question]) -> None:
    """LLaDA's rule (Nie et al. 2025), replayed by plain forwards: each step decided the likeliest token at the most
    confident masked position of the canvas as it stood."""
    found = record(llm, questions[:3], decode=SCHEDULE, max_tokens=32)
    assert len(found.trajectories) + found.counts["wrong"] == 3
    assert len(found.trajectories) >= 2
    mask = llm.info.mask_id
    assert mask is not None
    for one in found.trajectories:
        length, last = len(one.answer), max(one.steps)
        assert len(one.steps) == 32
        assert one.answer[-1] in llm.info.eos_ids
        assert last in one.steps[:length]  # the step that ended the text; it fills what is still open
        assert one.forwards == last + 1
        clean = [*one.answer, *[one.answer[-1]] * (32 - length)]
        for step in range(last + 1):
            canvas = [token if at < step else mask for token, at in zip(clean, one.steps, strict=True)]
            decided = [p for p, at in enumerate(one.steps) if at == step and (step < last or p < length)]
            assert len(decided) == 1
            sure, best = confidence(llm, one.prompt, canvas)
            highest = max(sure[p].item() for p, token in enumerate(canvas) if token == mask)
            assert sure[decided[0]].item() == pytest.approx(highest, abs=1e-5)
            assert int(best[decided[0]]) == clean[decided[0]]


def test_a_quick_decoder_decides_several_tokens_a_step(llm: LLM, questions: list[Question]) -> None:
    found = record(llm, questions, decode={"factor": 1.0}, max_tokens=32)
    assert found.counts["right"] >= 4
    for one in found.trajectories:
        assert set(one.steps) == set(range(max(one.steps) + 1))
        assert max(one.steps) + 1 <= one.forwards < len(one.answer)


def test_wrong_and_unfinished_answers_are_left_out_or_replaced(llm: LLM, questions: list[Question]) -> None:
    first, second = (replace(q, grader=None) for q in questions[:2])
    asked = [replace(first, grader="text", expected="nothing says this"), second]
    found = record(llm, asked, decode={"factor": 1.0}, max_tokens=32)
    assert found.counts == {"wrong": 1, "ungraded": 1}
    assert [one.id for one in found.trajectories] == [second.id]
    found = record(llm, asked, decode={"factor": 1.0}, max_tokens=32, wrong="truth")
    assert found.counts == {"replaced": 1, "ungraded": 1}
    assert found.trajectories[0] == Trajectory(first.id, first.task, first.prompt, first.truth, ())
    short = record(llm, [second], decode={"factor": 1.0}, max_tokens=2)
    assert short.counts == {"unfinished": 1}
    assert short.trajectories == []


def test_an_autoregressive_model_has_no_trajectory() -> None:
    with LLM("demo-draft") as llm, pytest.raises(UnsupportedError, match="autoregressive"):
        record(llm, [], decode={}, max_tokens=8)


def test_a_row_of_a_distillation_set_is_a_question(llm: LLM) -> None:
    row = check_row(
        {"prompt": "What is 1 + 2?", "teacher_text": "1 + 2 = 3\nAnswer: 3", "grader": "answer", "expected": "3"}
    )
    question = question_of(row, llm.tokenizer, 7)
    assert question.id == "row/7"
    assert llm.tokenizer.decode(question.truth[:-1]) == row.teacher_text
    assert question.truth[-1] == llm.tokenizer.eos_id
    assert question.prompt == llm.render([{"role": "user", "content": "What is 1 + 2?"}])
    assert (question.grader, question.expected) == ("answer", "3")
    bare = question_of(check_row({"prompt": "Hi", "id": "x"}, needs_text=False), llm.tokenizer, 0)
    assert (bare.id, bare.truth, bare.grader) == ("x", (), None)


def update(commit: dict[int, int], revise: dict[int, int | None] | None = None) -> StepEvent:
    return StepEvent("r", canvas=CanvasUpdate(commit, {}, revise or {}, False, 8, 0))


def test_a_transcript_follows_what_is_decided_again() -> None:
    transcript = Transcript()
    for event in (
        update({}),  # a forward that only stored K,V
        update({2: 12, 4: 14}),
        update({0: 10}, {2: None}),
        update({}),
        update({1: 11}, {4: 24}),
        update({2: 22}),
    ):
        transcript.absorb(event)
    assert transcript.fixed == {0: 10, 1: 11, 2: 22, 4: 24}
    assert transcript.steps == {0: 1, 1: 2, 4: 2, 2: 3}
    assert transcript.count == 4


ONES = [
    Trajectory("a/1", "code", (1, 2, 3), (4, 5, 2), (1, 0, 2, 2), 3),
    Trajectory("a/2", "", (7,), (2,), (), 0),
]


def test_files_give_back_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "t.jsonl"
    write_trajectories(path, ONES, {"model": "m", "decode": {"factor": 1.0}})
    header, found = read_trajectories(path, 8)
    assert found == ONES
    assert header == {"kind": "trajectories", "version": 1, "model": "m", "decode": {"factor": 1.0}}
    assert [p.name for p in path.parent.iterdir()] == ["t.jsonl"]
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[1:]))  # a header is optional
    assert read_trajectories(path, 8) == ({}, ONES)


GOOD = {"id": "x", "task": "t", "prompt": [1], "answer": [2], "steps": [0], "forwards": 1}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no trajectory"),
        ('{"__header__": {"kind": "trajectories"}}', "holds no trajectory"),
        ("{", "line 1"),
        ("[]", "line 1"),
        (json.dumps(GOOD) + "\n" + json.dumps({k: v for k, v in GOOD.items() if k != "steps"}), "line 2.*steps"),
        (json.dumps(GOOD | {"answer": []}), "at least one"),
        (json.dumps(GOOD | {"answer": [8]}), "below 8"),
        (json.dumps(GOOD | {"prompt": [-1]}), "at least 0"),
        (json.dumps(GOOD | {"prompt": [1.0]}), "integers"),
        (json.dumps(GOOD | {"answer": [2, 3]}), "steps must be as many"),
        (json.dumps(GOOD | {"forwards": None}), "line 1"),
    ],
)
def test_what_is_no_trajectory_is_refused_with_its_line(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=says):
        read_trajectories(path, 8)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.jsonl"):
        read_trajectories(tmp_path / "gone.jsonl", 8)


def test_windows_grow_as_published() -> None:
    """d3LLM's sizes 16, 24, 32 for three epochs: within epoch i it grows linearly from size i to size i + 1, and stays
    in the last."""
    sizes = [16, 24, 32]
    for step in range(301):
        epoch = 3 * step / 300
        i = min(int(epoch), 2)
        published = sizes[2] if i == 2 else int(sizes[i] + (epoch - i) * (sizes[i + 1] - sizes[i]))
        assert window_size(sizes, step / 300) == published
    assert [window_size(sizes, p) for p in (0.0, 1 / 6, 1 / 3, 0.5, 1.0)] == [16, 20, 24, 28, 32]
    assert {window_size([32], p / 10) for p in range(11)} == {32}
    with pytest.raises(ValidationError, match="windows"):
        window_size([], 0.5)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.75, 0.99, 1.0])
def test_a_state_in_teachers_order_is_one_the_teacher_was_in(share: float) -> None:
    order = [3, 0, 7, 1, 6, 2, 5, 4]  # position of the i-th decision
    steps = [order.index(position) for position in range(8)]
    states = [{p for p in range(8) if p not in order[:n]} for n in range(9)]
    masked = masked_state(steps, share, "teacher", torch.Generator().manual_seed(0))
    assert set(masked.nonzero()[:, 0].tolist()) == states[int((1 - share) * 8)]


def test_positions_of_one_step_are_shown_in_random_order() -> None:
    steps = [0, 0, 1, 1, 1, 2]
    draw = torch.Generator().manual_seed(1)
    seen = {tuple(masked_state(steps, 0.5, "teacher", draw).nonzero()[:, 0].tolist()) for _ in range(200)}
    assert seen == {(*pair, 5) for pair in itertools.combinations((2, 3, 4), 2)}
    unknown = {tuple(masked_state([0] * 4, 0.5, "teacher", draw).nonzero()[:, 0].tolist()) for _ in range(200)}
    assert unknown == set(itertools.combinations(range(4), 2))


def test_a_random_state_masks_each_position_with_its_own_chance() -> None:
    draw = torch.Generator().manual_seed(2)
    masks = torch.stack([masked_state(range(16), 0.3, "random", draw) for _ in range(2000)])
    assert masks.double().mean(0) == pytest.approx(torch.full((16,), 0.3).double(), abs=0.05)
    counts = masks.sum(1).double()
    assert counts.var().item() == pytest.approx(16 * 0.3 * 0.7, rel=0.1)  # binomial: independent of each other
