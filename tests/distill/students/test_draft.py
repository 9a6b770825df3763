"""Drafts re-aligned to their targets: what is learned is the target's distribution on its own answers, none is asked
for twice, and what is measured is what the engine serves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dfastllm.distill.students import acceptance
from dfastllm.distill.students import draft as command
from dfastllm.distill.students.acceptance import ALL, Measuring, measure_drafts, table
from dfastllm.distill.students.align import Alignment
from dfastllm.distill.students.answers import Answer, Asking, answered, given_answers
from dfastllm.distill.students.draft import Realignment, default_plan, main, realign
from dfastllm.distill.students.lessons import trainable
from dfastllm.distill.students.prompts import Prompts, read_prompts
from dfastllm.errors import CheckpointError, ContextLengthError, DataError, UnsupportedError, ValidationError
from dfastllm.llm import LLM
from dfastllm.models import Decoder, dense_attention, load
from dfastllm.text import Tokenizer
from dfastllm.train.loop import fit
from tests.kit.convert_models import write_tiny

TOKENS = 12


@pytest.fixture(scope="module")
def asked_once(target: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Prompts, list[Answer]]:
    """Answers with their likeliest tokens."""
    place = tmp_path_factory.mktemp("asked")
    file = place / "p.jsonl"
    file.write_text("".join(f"{json.dumps({'prompt': f'q{i}'})}\n" for i in range(24)))
    prompts = read_prompts([file], 0.25)
    with LLM(target) as llm:
        found, notes = answered(llm, [*prompts.train, *prompts.held], place / "a.jsonl", Asking(0.8, TOKENS, top=6))
        eos = llm.info.eos_ids[0]
    assert notes == []
    return prompts, [ending(a, eos) if i % 3 == 0 and not a.ended else a for i, a in enumerate(found)]


def ending(answer: Answer, eos: int) -> Answer:
    """As if it had ended by itself there. A random model hardly ever does."""
    assert answer.top is not None
    ids, logprobs = (F.pad(x, (0, 0, 0, 1), value=v) for x, v in zip(answer.top, (0, -torch.inf), strict=True))
    return replace(answer, ids=(*answer.ids, eos), ended=True, top=(ids, logprobs))


def alignment(target: Path, draft: Path, answers: list[Answer], held: int = 4, **options: Any) -> Alignment:
    whole = options.pop("whole", True)
    teacher = load(target, dtype="float32") if whole else None
    return Alignment(trainable(draft)[0], teacher, answers[held:], answers[:held], **{"tokens": 256, **options})


# ---- prompts ---------------------------------------------------------------------------------------------------------


def test_prompts_are_read_once_and_split_by_themselves(prompts: Path) -> None:
    found = read_prompts([prompts], 0.3)
    assert len(found.train) + len(found.held) == 40
    assert {prompt.task for prompt in found.held} == {"prose", "sums"}
    assert any("more than once" in note for note in found.notes)
    assert any("bad_json" in note for note in found.notes)
    keys = {prompt.key for prompt in found.held}
    prompts.write_text(prompts.read_text() + "".join(f'{{"prompt": "new {i}"}}\n' for i in range(30)))
    more = read_prompts([prompts], 0.3)
    assert keys < {prompt.key for prompt in more.held}, "a prompt that was held out once is trained on now"
    assert keys.isdisjoint(prompt.key for prompt in more.train)


def test_the_older_half_of_a_recording_is_read_first(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    for name, texts in (("r.jsonl.1", range(10)), ("r.jsonl", range(10, 20))):
        rows = [{"prompt": [{"role": "user", "content": f"t{i}"}]} for i in texts]
        (tmp_path / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    found = read_prompts([path], 0.5)
    texts = [prompt.messages[0]["content"] for prompt in found.train]
    assert texts == sorted(texts, key=lambda t: int(t[1:]))
    assert len(found.train) + len(found.held) == 20


def test_a_file_without_prompts_is_an_error_that_says_why(tmp_path: Path) -> None:
    empty = tmp_path / "p.jsonl"
    empty.write_text('{"prompt": ""}\n{"prompt": "only one"}\n')
    with pytest.raises(DataError, match="empty_prompt"):
        read_prompts([empty], 0.5)
    with pytest.raises(DataError, match="is not there"):
        read_prompts([tmp_path / "nowhere.jsonl"], 0.5)
    with pytest.raises(ValidationError, match="held_out"):
        read_prompts([empty], 1.0)


# ---- answers ---------------------------------------------------------------------------------------------------------


def test_answers_are_the_engines_and_none_is_made_twice(
    target: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = read_prompts([prompts], 0.3)
    every = [*read.train, *read.held]
    file, how = tmp_path / "answers.jsonl", Asking(max_tokens=TOKENS)
    with LLM(target) as llm:
        first, _ = answered(llm, every[:10], file, how)
        plain = llm.generate([a.prompt for a in first], [how.sampling(p, 99) for p in every[:10]])
        for one, other in zip(first, plain, strict=True):
            ids = other.outputs[0].token_ids
            assert one.ids == ((*ids, llm.info.eos_ids[0]) if one.ended else ids)
            assert one.ended == (other.outputs[0].finish_reason == "stop")
        with file.open("a") as broken:  # a run that was killed in the middle of a row
            broken.write('{"prompt": "q')
        made: list[int] = []
        real = llm.generate
        monkeypatch.setattr(llm, "generate", lambda p, s: made.append(len(p)) or real(p, s))
        again, _ = answered(llm, every, file, how)
        assert sum(made) == 30
        assert again[:10] == first
        assert answered(llm, every, file, how)[0] == again
        assert sum(made) == 30
        with pytest.raises(DataError, match=r"temperature 0.0 \(now 0.5\)"):
            answered(llm, every, file, replace(how, temperature=0.5))


def test_the_answers_are_a_distillation_set(target: Path, prompts: Path, tmp_path: Path) -> None:
    """Rows with an answer that ended are teacher_text for every other reader; the others say so."""
    from dfastllm.distill.data.rows import RowFile

    read = read_prompts([prompts], 0.3)
    with LLM(target) as llm:
        found, _ = answered(llm, read.train, tmp_path / "a.jsonl", Asking(0.9, TOKENS, top=3))
        texts = {a.key: llm.tokenizer.decode(a.ids[:-1]) for a in found if a.ended}
    file = RowFile(tmp_path / "a.jsonl", needs_text=False)
    rows = list(file)
    assert not file.skips.counts
    assert file.header["temperature"] == 0.9
    assert {r.metadata["key"]: r.teacher_text for r in rows if r.teacher_text} == {k: t for k, t in texts.items() if t}
    assert all(r.teacher_topk is not None and len(r.teacher_topk[0]) == 3 for r in rows if r.metadata["answer_ids"][1:])


def test_prompts_that_do_not_fit_are_left_out(target: Path, tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    rows = [{"prompt": f"q{i}"} for i in range(10)] + [{"prompt": "x" * 400}]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    read = read_prompts([file], 0.4)
    with LLM(target) as llm:
        found, notes = answered(llm, [*read.train, *read.held], tmp_path / "a.jsonl", Asking(max_tokens=500))
        assert len(found) == 10
        assert "fill the context" in notes[0]
        assert max(len(a.prompt) + len(a.ids) for a in found) <= llm.engine.max_len + 1


def test_answers_from_elsewhere(target: Path, tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(
        "".join(f'{{"prompt": "q{i}", "teacher_text": "{i} <|end|>"}}\n' for i in range(9)) + '{"prompt":"z"}'
    )
    read = read_prompts([file], 0.4)
    tokenizer = Tokenizer.load(target)
    found, notes = given_answers(tokenizer, [*read.train, *read.held])
    assert len(found) == 9
    assert "teacher_text" in notes[0]
    eos = tokenizer.eos_id
    assert all(a.ids[-1] == eos and eos not in a.ids[:-1] for a in found), "a spelt end of text became one"
    assert all(tokenizer.decode(a.prompt) == f"[user]q{a.ids[0] - tokenizer.encode('0')[0]}[assistant]" for a in found)


def test_cut_answers_have_no_end_and_told_tokens_are_kept(target: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(target)
    said = tokenizer.encode("yes", parse_special=False)
    topk = [[[id, -0.5], [id + 1, -1.5]] for id in said]
    cut = {"metadata": {"teacher": {"finish_reason": "length"}}}
    rows = [
        {"prompt": "ended", "teacher_text": "yes", "teacher_topk": topk},
        {"prompt": "told its end", "teacher_text": "yes", "teacher_topk": [*topk, [[tokenizer.eos_id, -0.1]]]},
        {"prompt": "cut", "teacher_text": "yes", "teacher_topk": topk, **cut},
        {"prompt": "cut, and nothing told", "teacher_text": "yes", **cut},
    ]
    file = tmp_path / "p.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    read = read_prompts([file], 0.3)
    found = {tokenizer.decode(a.prompt): a for a in given_answers(tokenizer, [*read.train, *read.held])[0]}
    ended, end_told, shortened, untold = (found[f"[user]{row['prompt']}[assistant]"] for row in rows)
    assert ended.ids == end_told.ids == (*said, tokenizer.eos_id)
    assert shortened.ids == untold.ids == tuple(said)
    assert (ended.ended, shortened.ended) == (True, False)
    assert untold.top is None
    for answer, last in ((ended, None), (end_told, tokenizer.eos_id), (shortened, None)):
        assert answer.top is not None
        ids, logprobs = answer.top
        assert ids[: len(said)].tolist() == [[id, id + 1] for id in said]
        assert len(ids) == len(answer.ids)
        if len(answer.ids) > len(said):
            assert (logprobs[-1] > -torch.inf).tolist() == ([False, False] if last is None else [True, False])


# ---- the loss --------------------------------------------------------------------------------------------------------


def reference(target: Path, draft: Path, answers: list[Answer], temperature: float) -> tuple[float, ...]:
    """Divergence, agreement, overlap and cross entropy by the book: each answer on its own, in float64."""
    teacher, student = (load(path, dtype="float32").double() for path in (target, draft))
    total = agreed = overlap = entropy = count = 0.0
    for a in answers:
        ids = torch.tensor([*a.prompt, *a.ids[:-1]])
        attend = dense_attention(1, len(ids), "causal")
        with torch.no_grad():
            p, q = (
                model.head(model(ids, torch.arange(len(ids)), attend))[len(a.prompt) - 1 :].double()
                for model in (teacher, student)
            )
        soft_p, soft_q = ((x / temperature).softmax(-1) for x in (p, q))
        total += float((soft_p * (soft_p.log() - soft_q.log())).sum()) * temperature**2
        agreed += float((p.argmax(-1) == q.argmax(-1)).sum())
        overlap += float(torch.minimum(soft_p, soft_q).sum())
        entropy -= float(q.log_softmax(-1).gather(1, torch.tensor(a.ids)[:, None]).sum())
        count += len(a.ids)
    return total / count, agreed / count, overlap / count, entropy / count


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_validation_is_the_books(
    target: Path, draft: Path, asked_once: tuple[Prompts, list[Answer]], temperature: float
) -> None:
    work = alignment(target, draft, asked_once[1], temperature=temperature)
    found = work.validate(0)
    wanted = reference(target, draft, work.held, temperature or 1.0)
    names = ("validation_loss", "agreement", "overlap", "cross_entropy")
    assert tuple(found[name] for name in names) == pytest.approx(wanted, rel=1e-4)


def test_the_loss_is_the_validations_divergence(
    target: Path, draft: Path, asked_once: tuple[Prompts, list[Answer]]
) -> None:
    """Over all batches of an epoch, weighted by their tokens; so accumulated steps are means over tokens."""
    work = alignment(target, draft, asked_once[1], temperature=0.7)
    total = count = 0.0
    for batch in work._epoch(0):
        tokens = work.counts(batch)["divergence"]
        total += work.losses(batch, 0).terms["divergence"].item() * tokens
        count += tokens
    wanted = reference(target, draft, work.answers, 0.7)[0]
    assert total / count == pytest.approx(wanted, rel=1e-4)


def test_known_tokens_alone_teach_too(target: Path, draft: Path, asked_once: tuple[Prompts, list[Answer]]) -> None:
    """The likeliest tokens are a lower bound of the divergence (a coarser partition), and the end of an answer, whose
    distribution an answer does not carry, is learned as a token."""
    answers = asked_once[1]
    whole = alignment(target, draft, answers)
    listed = alignment(target, draft, answers, whole=False)
    ended = next(batch for batch in listed._epoch(0) if any(listed.answers[i].ended for i in batch))
    terms, exact = listed.losses(ended, 0).terms, whole.losses(ended, 0).terms
    assert set(terms) == {"divergence", "token"}
    assert set(exact) == {"divergence"}
    assert 0 < terms["divergence"].item() <= exact["divergence"].item() + 1e-4
    model = load(draft, dtype="float32")
    wanted = count = 0.0
    for a in (listed.answers[i] for i in ended):
        ids = torch.tensor([*a.prompt, *a.ids[:-1]])
        with torch.no_grad():
            logits = model.head(model(ids, torch.arange(len(ids)), dense_attention(1, len(ids), "causal")))
        wanted -= float(logits[-1].log_softmax(-1)[a.ids[-1]]) if a.ended else 0.0
        count += len(a.ids)
    assert terms["token"].item() == pytest.approx(wanted / count, rel=1e-4)
    assert "overlap" not in listed.validate(0)


def test_an_epoch_has_every_answer_once_and_resumes_anywhere(
    target: Path, draft: Path, asked_once: tuple[Prompts, list[Answer]]
) -> None:
    work = alignment(target, draft, asked_once[1])
    stream = work.batches([0, 0])
    seen = [next(stream) for _ in range(2 * work.steps_of_epoch + 1)]
    first, second = seen[: work.steps_of_epoch], seen[work.steps_of_epoch : 2 * work.steps_of_epoch]
    for epoch in (first, second):
        assert sorted(i for batch, _ in epoch for i in batch) == list(range(len(work.answers)))
    assert [batch for batch, _ in first] != [batch for batch, _ in second]
    for at in (0, 1, work.steps_of_epoch - 1, work.steps_of_epoch):
        position = json.loads(json.dumps(seen[at][1]))
        again = work.batches(position)
        assert [next(again) for _ in range(2)] == seen[at + 1 : at + 3]


def test_what_cannot_be_learned_is_named(target: Path, draft: Path, asked_once: tuple[Prompts, list[Answer]]) -> None:
    answers = asked_once[1]
    with pytest.raises(DataError, match="at most 3 tokens"):
        alignment(target, draft, answers, longest=3)
    with pytest.raises(ContextLengthError, match="the draft's context is 256"):
        alignment(target, draft, answers, longest=1000)
    with pytest.raises(DataError, match="likeliest tokens"):
        alignment(target, draft, [replace(a, top=None) for a in answers], whole=False)
    with pytest.raises(ValidationError, match="divergence must be"):
        alignment(target, draft, answers, kind="euclid")
    short = alignment(target, draft, answers, longest=max(len(a.prompt) + len(a.ids) for a in answers) - 1)
    assert short.left_out > 0


@pytest.mark.parametrize("whole", [True, False])
def test_training_brings_the_draft_nearer(
    target: Path, draft: Path, asked_once: tuple[Prompts, list[Answer]], whole: bool, tmp_path: Path
) -> None:
    work = alignment(target, draft, asked_once[1], whole=whole, temperature=0.8)
    before = work.validate(0)
    plan = default_plan(steps=30, lr=3e-3, matrix_lr=3e-3, warmup=3, save_every=15)
    fit(work, plan, tmp_path / "run")
    after = work.validate(30)
    assert float(after["validation_loss"]) < 0.8 * float(before["validation_loss"])
    resumed = alignment(target, draft, asked_once[1], whole=whole, temperature=0.8)
    fit(resumed, plan, tmp_path / "half", stop=15)
    resumed = alignment(target, draft, asked_once[1], whole=whole, temperature=0.8)
    fit(resumed, plan, tmp_path / "half")
    assert all(torch.equal(p, q) for p, q in zip(work.model.parameters(), resumed.model.parameters(), strict=True))


def test_vocabularies_padded_to_other_widths(
    draft: Path, asked_once: tuple[Prompts, list[Answer]], tmp_path: Path
) -> None:
    wide = write_tiny(tmp_path / "wide", layers=2, vocab_size=272)
    work = alignment(wide, draft, asked_once[1])
    assert work.vocabulary == 260
    assert isinstance(work.validate(0)["validation_loss"], float)
    narrow = alignment(draft, wide, asked_once[1])
    assert narrow.vocabulary == 260
    narrow.losses(narrow._epoch(0)[0], 0).terms["divergence"].backward()  # type: ignore[no-untyped-call]


# ---- measuring -------------------------------------------------------------------------------------------------------


def test_a_draft_that_is_its_target_is_accepted_whole(target: Path, draft: Path) -> None:
    prompts = [(("prose", "sums")[i % 2], (20 + i, 30, 40)) for i in range(4)]
    how = Measuring(length=3, max_tokens=13, repeats=1)
    rows = measure_drafts(target, {"itself": target, "half": draft}, prompts, how)
    assert [(row.draft, row.group) for row in rows] == [
        (label, group) for label in ("itself", "half") for group in ("prose", "sums", ALL)
    ]
    by = {(row.draft, row.group): row for row in rows}
    same, half = by["itself", ALL], by["half", ALL]
    assert same.accepted == 1.0
    assert same.per_verify == 3.0
    assert same.per_forward == 13 / 4  # the prompt's forward gives one token, each verifying one four
    assert half.accepted < 1.0
    assert half.per_verify < same.per_verify
    assert same.prompts == 4
    assert same.per_forward > half.per_forward
    assert all(row.plain_per_second > 0 and row.drafted_per_second > 0 for row in rows)
    assert all(min(row.plain_ms, row.verify_ms, row.draft_ms) > 0 for row in rows)
    for row in rows:
        drafts, drafted, accepted = (sum(column) for column in zip(*row.by_prompt, strict=True))
        assert (accepted / drafted, accepted / drafts) == pytest.approx((row.accepted, row.per_verify))
    assert "speedup" in table(rows)


def test_a_draft_of_another_vocabulary_is_refused(target: Path) -> None:
    with pytest.raises(UnsupportedError, match="cannot draft"):
        measure_drafts(target, {"demo": "demo-draft"}, [("", (1, 2))], Measuring())


def test_the_command_compares_drafts(
    target: Path, draft: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--most", "4", "--max-tokens", "8", "--repeats", "1"]
    assert acceptance.main([str(target), str(prompts), str(draft), "--quantization", "w8", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["prompts", "prose", "sums", ALL]
    assert acceptance.main([str(target), str(prompts), "nowhere"]) == 1
    assert "no model 'nowhere'" in capsys.readouterr().err


# ---- the whole -------------------------------------------------------------------------------------------------------


def test_the_whole_on_small_models(target: Path, draft: Path, prompts: Path, tmp_path: Path) -> None:
    asked = Realignment(
        str(target),
        str(draft),
        (str(prompts),),
        tmp_path / "out",
        held_out=0.3,
        asking=Asking(max_tokens=TOKENS),
        longest=200,
        tokens=512,
        plan=default_plan(steps=40, lr=3e-3, matrix_lr=3e-3, warmup=3),
        measuring=Measuring(length=3, max_tokens=TOKENS, repeats=1),
    )
    said: list[str] = []
    report = realign(asked, say=said.append)
    assert report == json.loads((tmp_path / "out" / "report.json").read_text())
    before, after = report["held_out"]["before"], report["held_out"]["after"]
    assert after["validation_loss"] < before["validation_loss"]
    rows = {(row["draft"], row["group"]): row for row in report["drafts"]}
    assert set(rows) == {(label, group) for label in ("before", "after") for group in ("prose", "sums", ALL)}
    assert report["gain"][ALL] == rows["after", ALL]["per_verify"] / rows["before", ALL]["per_verify"]
    made = tmp_path / "out" / "draft"
    assert isinstance(load(made), Decoder)
    assert Tokenizer.load(made).has_chat_template
    assert any(line.startswith("answers: ") for line in said)
    said.clear()
    again = realign(asked, say=said.append)  # nothing is asked for or trained again
    assert again["held_out"] == report["held_out"]
    assert not any("answers:" in line for line in said)
    with pytest.raises(CheckpointError, match="kind differ"):
        realign(replace(asked, kind="reverse"), say=said.append)
    (tmp_path / "out" / "mine.txt").write_text("not of a run")
    command._clear(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def write_config(path: Path, target: Path, draft: Path, prompts: Path, more: str = "") -> Path:
    path.write_text(
        f"model: {{student: {draft}}}\n"
        f"data: {{train: [{prompts}], max_seq_length: 200}}\n"
        "train: {steps: 8, lr: 0.003, warmup: 2, val_every: 8, save_every: 4, tensorboard: false}\n"
        f"kd:\n  local_teacher: {target}\n"
        "  draft: {max_tokens: 12, held_out: 0.3, batch_tokens: 512, length: 3, repeats: 1}\n" + more
    )
    return path


def test_the_whole_as_a_configuration_says(target: Path, draft: Path, prompts: Path, tmp_path: Path) -> None:
    from dfastllm.distill.run import run_distillation

    config = write_config(tmp_path / "c.yaml", target, draft, prompts)
    said: list[str] = []
    assert run_distillation(config, tmp_path / "out", steps=4, say=said.append) is None
    assert (tmp_path / "out" / "run" / "step-4").is_dir()
    assert not (tmp_path / "out" / "report.json").exists()
    run_distillation(config, tmp_path / "out", say=said.append)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["steps"] == 8
    assert report["measuring"]["length"] == 3
    assert report["held_out"]["after"]["validation_loss"] < report["held_out"]["before"]["validation_loss"]


def test_a_configuration_is_tried_before_it_runs(target: Path, draft: Path, prompts: Path, tmp_path: Path) -> None:
    from dfastllm.distill.check import check_config

    checks = check_config(write_config(tmp_path / "c.yaml", target, draft, prompts))
    assert [(one.name, one.passed) for one in checks] == [("configuration", True), ("drafts", True)]
    assert "accepted in a verifying forward" in checks[1].found
    other = check_config(write_config(tmp_path / "d.yaml", target, Path("demo-draft"), prompts))
    assert not other[1].passed
    assert "cannot draft" in other[1].found


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ("  kl_weight: 0.5\n", "kd.kl_weight"),
        ("speed: {use_length_aware_kd: true}\n", "speed.use_length_aware_kd"),
        ("quant: {enabled: true}\n", "quant"),
        ("eval: {samples: 3}\n", "eval.samples"),
    ],
)
def test_what_a_configuration_cannot_mean_is_refused(
    target: Path, draft: Path, prompts: Path, tmp_path: Path, more: str, param: str
) -> None:
    from dfastllm.distill.run import run_distillation

    config = write_config(tmp_path / "c.yaml", target, draft, prompts, more)
    with pytest.raises(ValidationError, match=r"no meaning with kd\.draft") as raised:
        run_distillation(config, tmp_path / "out")
    assert raised.value.param == param


def test_the_command_says_what_is_wrong(
    target: Path, draft: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    for words, message in (
        ([str(target), str(draft), "nowhere.jsonl", out], "is not there"),
        ([str(target), "demo-draft", str(prompts), out, "--held-out", "0.3"], "cannot draft"),
        (["demo-block", "demo-draft", str(prompts), out, "--held-out", "0.3"], "autoregressive targets"),
        (
            [str(target), str(draft), str(prompts), out, "--given", "--top", "3", "--held-out", "0.3"],
            "0 answers to learn from",
        ),
    ):
        assert main(words) == 1
        assert message in capsys.readouterr().err
