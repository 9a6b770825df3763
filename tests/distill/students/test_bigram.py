"""Bigram heads of masked drafts: what is learned from is what the engine drafts, the loss is the book's, training makes
more of the drafts stand, and the whole goes the way of any draft."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dfastllm import assemble
from dfastllm.core import Request, SamplingParams, SequenceState
from dfastllm.distill.students.acceptance import Measuring
from dfastllm.distill.students.answers import Answer, Asking, answered
from dfastllm.distill.students.bigram import Chains, Pairs, record
from dfastllm.distill.students.draft import Realignment, default_plan, main, realign
from dfastllm.distill.students.prompts import read_prompts
from dfastllm.engine import EngineConfig
from dfastllm.engine.speculate import DraftCanvas, bigram
from dfastllm.errors import DataError, ValidationError
from dfastllm.llm import LLM
from dfastllm.models.bigram import FILE, Bigram, read_bigram
from dfastllm.train.loop import fit
from tests.distill.students.test_draft import write_config
from tests.kit.convert_models import write_tiny

TOKENS, LENGTH = 10, 4


@pytest.fixture(scope="module", params=["llada", "sdar"])
def masked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("masked") / "masked", family=request.param, layers=2, seed=5)


@pytest.fixture(autouse=True)
def _all_tokens_are_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model's likeliest tokens are hardly ever its target's."""
    monkeypatch.setattr(bigram, "CANDIDATES", 10_000)


@pytest.fixture(scope="module")
def asked_once(target: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Answer]:
    place = tmp_path_factory.mktemp("asked")
    file = place / "p.jsonl"
    file.write_text("".join(f"{json.dumps({'prompt': f'q{i}'})}\n" for i in range(24)))
    prompts = read_prompts([file], 0.25)
    with LLM(target) as llm:
        found, notes = answered(llm, [*prompts.train, *prompts.held], place / "a.jsonl", Asking(0.0, TOKENS))
    assert notes == []
    return found


def pairs(target: Path, masked: Path, answers: list[Answer], **options: Any) -> Pairs:
    info, model = assemble.model_info(target), assemble.load(masked).model
    given = {"rank": 8, "length": LENGTH, "rows": 64, "longest": 200, **options}
    return Pairs(model, info, answers[4:], answers[:4], **given)


def test_what_is_recorded_is_what_the_engine_drafts(target: Path, masked: Path, asked_once: list[Answer]) -> None:
    """At every position of answers of different lengths, alone here, beside others there."""
    some = [replace(a, ids=a.ids[: TOKENS - n]) for n, a in enumerate(asked_once[:3])]
    info, model = assemble.model_info(target), assemble.load(masked).model
    chains = record(model, info, some, LENGTH)
    assert chains.length == LENGTH
    assert len(chains.ids) == LENGTH * sum(len(a.ids) for a in some)
    seen = {}
    for at, row in enumerate(range(0, len(chains.ids), LENGTH)):
        part = slice(row, row + LENGTH)
        seen[at] = (chains.ids[part, 0].tolist(), chains.previous[row].item(), chains.said[part].tolist())
    wanted = []
    for step in range(TOKENS):  # answers in lockstep
        for a in some:
            if step >= len(a.ids):
                continue
            text = [*a.prompt, *a.ids[:step]]
            asking = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
            seq = SequenceState(Request("alone", a.prompt, asking), info, text, seed=0)
            (draft,) = DraftCanvas(model, EngineConfig(kv_tokens=1024)).propose([(seq, LENGTH)])
            rest = [*a.ids[step : step + LENGTH], *[-1] * LENGTH][:LENGTH]
            wanted.append((list(draft.tokens), text[-1], rest))
    assert list(seen.values()) == wanted


def small_chains() -> Chains:
    """Three drafts of two tokens, three candidates each."""
    ids = torch.tensor([[4, 5, 6], [7, 4, 5], [5, 4, 7], [4, 6, 7], [6, 5, 4], [4, 5, 7]], dtype=torch.int32)
    logits = torch.tensor([[2.0, 1.0, 0.0]]).repeat(6, 1) + 0.1 * torch.arange(6)[:, None]
    said = torch.tensor([5, 4, 5, 9, 6, -1])  # draft 0: 5 4; draft 1: 5 and one that is no candidate; draft 2 ends
    return Chains(ids, logits, torch.tensor([1, 5, 2, 5, 3, 6]), said, 2)


def test_rows_weigh_what_a_draft_reaches() -> None:
    chains = small_chains()
    p = torch.tensor([2.0, 1.0, 0.0]).softmax(-1).tolist()
    assert chains.place.tolist() == [1, 1, 0, -1, 0, -1]
    assert chains.weights().tolist() == pytest.approx([1.0, p[1], 1.0, 0.0, 1.0, 0.0])


def test_accepted_tokens_are_those_of_a_plain_loop() -> None:
    chains = small_chains()
    before, after = torch.zeros(10, 1), torch.zeros(10, 1)
    none = Bigram(before, after)
    assert chains.accepted(none).tolist() == [0, 1, 1]  # 4 for 5; 5, then 4 for 9; 6
    before[1], after[5] = 3.0, 1.0  # after 1 comes 5, and after 5 then 7, which is not 4
    assert chains.accepted(Bigram(before, after)).tolist() == [1, 1, 1]
    before[5], after[4] = 1.0, 2.0  # after 5 comes 4; after 1 now 4 again: 2 + 3 * 2 > 1 + 3
    assert chains.accepted(Bigram(before, after)).tolist() == [0, 1, 1]
    before[1], before[5], after[4], after[5] = 1.0, 0.8, 1.3, 2.4
    assert chains.accepted(Bigram(before, after)).tolist() == [2, 1, 1]


def test_the_loss_is_the_books(target: Path, masked: Path, asked_once: list[Answer]) -> None:
    work = pairs(target, masked, asked_once)
    with torch.no_grad():
        work.model.after.normal_()
    batch = next(work.batches([0, 0]))[0]
    total = weight = 0.0
    for row in batch:
        terms = (work.model.before[work.previous[row]] * work.model.after[work.ids[row]]).sum(-1).double()
        logits = work.logits[row].double() + terms
        w = work.weights[row].item()
        total -= w * logits.log_softmax(-1)[work.place[row]].item()
        weight += w
    assert work.losses(batch, 0).terms["token"].item() == pytest.approx(total / weight, rel=1e-5)
    assert work.counts(batch)["token"] == pytest.approx(weight, rel=1e-5)


def test_an_epoch_has_each_row_once_and_goes_on_anywhere(target: Path, masked: Path, asked_once: list[Answer]) -> None:
    work = pairs(target, masked, asked_once, rows=8)
    batches, seen, positions = work.batches([0, 0]), [], [[0, 0]]
    while positions[-1][0] == 0:
        batch, position = next(batches)
        seen += batch
        positions.append(position)
    assert sorted(seen) == list(range(len(work.ids)))
    assert len(positions) - 1 == work.steps_of_epoch
    assert next(work.batches(positions[1]))[0] == seen[8:16]


def cycle(first: int) -> tuple[int, ...]:
    found = [first]
    for _ in range(TOKENS - 1):
        found.append(20 + (found[-1] * 5 + 7) % 30)
    return tuple(found)


def test_training_makes_more_of_a_draft_stand(
    target: Path, masked: Path, asked_once: list[Answer], tmp_path: Path
) -> None:
    """On answers that were held out, of which each token follows from the one before it; and a run that was stopped
    goes on to the same bits."""
    answers = [replace(a, ids=cycle(a.prompt[-1] + n)) for n, a in enumerate(asked_once)]
    work = pairs(target, masked, answers)
    before = work.validate(0)
    plan = default_plan(steps=80, lr=3e-2, warmup=3, weight_decay=0.0, save_every=20)
    fit(work, plan, tmp_path / "run")
    after = work.validate(80)
    assert float(after["validation_loss"]) < 0.9 * float(before["validation_loss"])
    assert float(after["accepted"]) > float(before["accepted"]) + 1.0
    for stop in (20, None):
        again = pairs(target, masked, answers)
        fit(again, plan, tmp_path / "half", stop=stop)
    assert all(torch.equal(p, q) for p, q in zip(work.model.parameters(), again.model.parameters(), strict=True))


def test_answers_that_cannot_be_learned_from(target: Path, masked: Path, asked_once: list[Answer]) -> None:
    with pytest.raises(DataError, match="0 answers to learn from and 0 to measure on have at most 3 tokens"):
        pairs(target, masked, asked_once, longest=3)


def test_the_whole_on_small_models(target: Path, masked: Path, prompts: Path, tmp_path: Path) -> None:
    """The draft's weights are the same files, its head is beside them, and served with it more is accepted."""
    asked = Realignment(
        str(target),
        str(masked),
        (str(prompts),),
        tmp_path / "out",
        held_out=0.3,
        asking=Asking(max_tokens=TOKENS),
        longest=200,
        tokens=64,
        rank=8,
        plan=default_plan(steps=60, lr=2e-2, warmup=3, weight_decay=0.0),
        measuring=Measuring(LENGTH, max_tokens=TOKENS, repeats=1),
    )
    report = realign(asked, say=lambda line: None)
    assert report is not None
    made = tmp_path / "out" / "draft"
    assert {path.name for path in made.iterdir()} == {path.name for path in masked.iterdir()} | {FILE}
    assert all((made / path.name).read_bytes() == path.read_bytes() for path in masked.iterdir())
    found = read_bigram(made, assemble.model_info(masked).vocab_size)
    assert found is not None
    assert found.rank == 8
    rows = {(row["draft"], row["group"]): row["per_verify"] for row in report["drafts"]}
    assert rows["after", "all"] > rows["before", "all"]
    prompt = "q3"
    plain = LLM(target)
    with plain, LLM(target, speculative=json.dumps({"method": "diffusion", "model": str(made)})) as drafted:
        one, other = (llm.generate(prompt, SamplingParams(temperature=0, max_tokens=20)) for llm in (plain, drafted))
        assert one[0].outputs[0].token_ids == other[0].outputs[0].token_ids
        assert other[0].outputs[0].usage.drafts > 0


def test_as_a_configuration_says(target: Path, masked: Path, prompts: Path, tmp_path: Path) -> None:
    from dfastllm.distill.check import check_config
    from dfastllm.distill.run import run_distillation

    config = write_config(tmp_path / "c.yaml", target, masked, prompts)
    checks = check_config(config)
    assert [(one.name, one.passed) for one in checks] == [("configuration", True), ("drafts", True)]
    run_distillation(config, tmp_path / "out", say=lambda line: None)
    head = read_bigram(tmp_path / "out" / "draft", assemble.model_info(masked).vocab_size)
    assert head is not None
    assert head.rank == 16
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["held_out"]["after"]["validation_loss"] < report["held_out"]["before"]["validation_loss"]


def test_what_means_nothing_for_a_kind_of_draft_is_refused(
    target: Path, draft: Path, masked: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = Realignment(str(target), str(masked), (str(prompts),), tmp_path / "out", held_out=0.3)
    muon = replace(plain, plan=default_plan(optimizer="muon"))
    wrong: list[tuple[Realignment, str]] = [
        (replace(plain, asking=Asking(top=4)), "top"),
        (replace(plain, kind="reverse"), "kind"),
        (replace(plain, bf16=True), "bf16"),
        (replace(plain, frozen=True), "frozen"),
        (muon, "optimizer"),
        (replace(plain, device="cuda"), "device"),
    ]
    for asked, param in wrong:
        with pytest.raises(ValidationError, match=f"{param} has no meaning for .*masked") as error:
            realign(asked, say=lambda line: None)
        assert error.value.param == param
    with pytest.raises(ValidationError, match="rank is of the bigram head"):
        realign(replace(plain, draft=str(draft), rank=4), say=lambda line: None)
    assert main([str(target), str(draft), str(prompts), str(tmp_path / "o"), "--rank", "4", "--held-out", "0.3"]) == 1
    assert "is autoregressive" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
