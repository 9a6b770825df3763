"""A draft that says some tokens only learns these: which, and what of the target's distributions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dfastllm.distill.students.align import Alignment
from dfastllm.distill.students.answers import Answer
from dfastllm.distill.students.draft import Realignment, default_plan, realign
from dfastllm.distill.students.layers import make_student
from dfastllm.distill.students.lessons import trainable
from dfastllm.distill.students.shortlist import covered, frequent, main
from dfastllm.errors import ValidationError
from dfastllm.models import dense_attention, load
from dfastllm.models.shortlist import FILE, read_shortlist
from tests.kit.convert_models import write_tiny

IDS = torch.tensor([1, 5, 8, 20, 33, 90, 101, 200, 259])


def test_the_most_frequent_then_the_lowest() -> None:
    answers = [(9, 9, 4), (4, 9, 7)]
    assert frequent(answers, 3, 12, always=(11,)) == [4, 9, 11]
    assert frequent(answers, 6, 12) == [0, 1, 2, 4, 7, 9]
    assert frequent(answers, 12, 12) == list(range(12))
    assert covered(answers, [4, 9]) == pytest.approx(5 / 6)
    for size in (0, 13):
        with pytest.raises(ValidationError, match="size must be in"):
            frequent(answers, size, 12)


def made_answers(count: int, length: int = 7) -> list[Answer]:
    """Random ones, half of their tokens listed, with three likeliest tokens each and nothing known of the last."""
    draws = torch.Generator().manual_seed(4)
    found = []
    for n in range(count):
        ids = torch.randint(0, 260, (length,), generator=draws)
        ids[::2] = IDS[torch.randint(0, len(IDS), (len(ids[::2]),), generator=draws)]
        tops = torch.stack([torch.randperm(260, generator=draws)[:3] for _ in range(length)]).int()
        tops[:, 1] = IDS[torch.randint(0, len(IDS), (length,), generator=draws)].int()
        tops[:, 0] = torch.where((tops[:, 0] == tops[:, 1]) | (tops[:, 0] == tops[:, 2]), 2, tops[:, 0])
        tops[:, 2] = torch.where((tops[:, 2] == tops[:, 1]) | (tops[:, 2] == tops[:, 0]), 3, tops[:, 2])
        logprobs = torch.tensor([0.5, 0.3, 0.1]).log().repeat(length, 1)
        logprobs[-1] = -torch.inf
        prompt = tuple(torch.randint(0, 260, (4,), generator=draws).tolist())
        found.append(Answer(f"{n:064x}", "", prompt, tuple(ids.tolist()), True, (tops, logprobs)))
    return found


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("pair")
    target = write_tiny(place / "target", layers=3, tied=True)
    return target, make_student(target, place / "draft", layers=1).path


@pytest.mark.parametrize("whole", [True, False])
def test_loss_and_validation_are_the_books(pair: tuple[Path, Path], whole: bool) -> None:
    """Each answer alone, in float64: the divergence of both distributions given that the token is listed; of likeliest
    tokens their mass on tokens that are not listed is taken out and what is left is renormalised, with a bucket for the
    rest. A best token that is not listed is never agreed on."""
    target, draft = (load(path, dtype="float32").double() for path in pair)
    answers = made_answers(6)
    work = Alignment(
        trainable(pair[1])[0], load(pair[0], dtype="float32") if whole else None, answers, answers, shortlist=IDS
    )
    total = agreed = entropy = token = 0.0
    known = listed = count = 0
    for a in answers:
        ids = torch.tensor([*a.prompt, *a.ids[:-1]])
        attend = dense_attention(1, len(ids), "causal")
        with torch.no_grad():
            p, q = (m.head(m(ids, torch.arange(len(ids)), attend))[len(a.prompt) - 1 :] for m in (target, draft))
        log_q = q[:, IDS].log_softmax(-1)
        assert a.top is not None
        for t, id in enumerate(a.ids):
            count += 1
            column = [c for c, one in enumerate(IDS.tolist()) if one == id]
            if column:
                listed += 1
                entropy -= float(log_q[t, column[0]])
            if whole:
                log_p = p[t, IDS].log_softmax(-1)
                total += float((log_p.exp() * (log_p - log_q[t])).sum())
                agreed += int(p[t].argmax()) == int(IDS[log_q[t].argmax()])
                known += 1
                continue
            if t == len(a.ids) - 1:
                token -= float(log_q[t, column[0]]) if column else 0.0
                continue
            told = {int(i): float(v.exp()) for i, v in zip(a.top[0][t], a.top[1][t], strict=True)}
            inside = {i: v for i, v in told.items() if i in IDS.tolist()}
            left = 1 - sum(v for i, v in told.items() if i not in inside)
            masses = [v / left for v in inside.values()]
            ours = [float(log_q[t, IDS.tolist().index(i)].exp()) for i in inside]
            masses, ours = [*masses, 1 - sum(masses)], [*ours, 1 - sum(ours)]
            total += sum(
                m * (torch.tensor(m).log() - torch.tensor(o).log()).item() for m, o in zip(masses, ours, strict=True)
            )
            agreed += max(told, key=lambda i: told[i]) == int(IDS[log_q[t].argmax()])
            known += 1
    found = work.validate(0)
    assert found["validation_loss"] == pytest.approx(total / known, rel=1e-4)
    assert found["agreement"] == pytest.approx(agreed / known)
    assert found["cross_entropy"] == pytest.approx(entropy / listed, rel=1e-4)
    assert "overlap" not in found
    losses = work.losses(tuple(range(6)), 0).terms
    assert losses["divergence"].item() == pytest.approx(total / count, rel=1e-4)
    assert losses["token"].item() == pytest.approx(token / count, rel=1e-4) if not whole else "token" not in losses
    sum(losses.values()).backward()  # type: ignore[union-attr]
    gradient = work.model.embed.weight.grad
    assert gradient is not None
    assert gradient[IDS].abs().sum(-1).min() > 0
    seen = {*IDS.tolist(), *(i for a in answers for i in (*a.prompt, *a.ids))}
    assert not gradient[[i for i in range(260) if i not in seen]].any(), "a token that is neither read nor said"


def test_a_frozen_embedding_stays(pair: tuple[Path, Path]) -> None:
    answers = made_answers(6)
    work = Alignment(trainable(pair[1])[0], None, answers, answers, shortlist=IDS, frozen=True)
    sum(work.losses((0, 1), 0).terms.values()).backward()  # type: ignore[union-attr]
    assert work.model.embed.weight.grad is None
    assert all(p.grad is not None for p in work.model.layers.parameters())


def test_from_answers_to_a_draft_that_is_served(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """The command writes the list; the draft learns on rows collected elsewhere, and the result has it too."""
    target, draft = pair[0], make_student(pair[0], tmp_path / "draft", layers=1).path
    rows = [
        {
            "prompt": f"q{n}",
            "teacher_text": "abcabcab",
            "teacher_topk": [[[97 + n % 3, -0.1], [3, -3.0]]] * (8 if n % 4 else 2),
        }
        for n in range(30)
    ]
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert main([str(draft), str(file), "--size", "40"]) == 0
    ids = read_shortlist(draft, 260)
    assert ids is not None
    assert len(ids) == 40
    said: list[str] = []
    asked = Realignment(
        str(target),
        str(draft),
        (str(file),),
        tmp_path / "out",
        given=True,
        whole=False,
        held_out=0.3,
        plan=default_plan(steps=2, warmup=1, validate_every=2, save_every=2),
    )
    report = realign(replace(asked, measuring=replace(asked.measuring, max_tokens=6, repeats=1)), say=said.append)
    assert report is not None
    assert any("prompts were left out" in line for line in said), "rows whose teacher_topk is of another length"
    assert (tmp_path / "out" / "draft" / FILE).read_text() == (draft / FILE).read_text()
    assert {row["draft"] for row in report["drafts"]} == {"before", "after"}
