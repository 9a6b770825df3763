"""A teacher in this process: its distributions against a plain forward of each row by itself, its answers against the
engine's."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from torch import Tensor

from dfastllm.distill.data.collate import collate_kd_batch
from dfastllm.distill.teacher.collect import collect
from dfastllm.distill.teacher.local import LocalTeacher, check_same_vocabulary
from dfastllm.errors import ContextLengthError, UnsupportedError, ValidationError
from dfastllm.llm import LLM, resolve
from dfastllm.models import Decoder, Ids, dense_attention, tiny
from dfastllm.tasks import draw
from dfastllm.text import Tokenizer
from tests.kit.served import VOCAB, byte_tokenizer


def model_of(tokenizer: Tokenizer, family: str = "llama", **config: Any) -> Decoder:
    assert tokenizer.eos_id is not None
    mask = tokenizer.mask_id if family == "llada" else None
    ids = Ids(eos=(tokenizer.eos_id,), bos=tokenizer.bos_id, pad=tokenizer.pad_id, mask=mask)
    return tiny(family, 0, ids=ids, vocab_size=VOCAB, **{"max_len": 64, **config})


@pytest.fixture(scope="module")
def small(bytes_tokenizer: Tokenizer) -> LocalTeacher:
    return LocalTeacher(model_of(bytes_tokenizer), bytes_tokenizer)


def batch_of(lengths: list[tuple[int, int]]) -> dict[str, Any]:
    """Rows of (prompt, response) tokens."""
    rows = []
    for at, (prompt, response) in enumerate(lengths):
        ids = torch.randint(0, 256, (prompt + response,), generator=torch.Generator().manual_seed(at))
        labels = ids.clone()
        labels[:prompt] = -100
        rows.append({"input_ids": ids, "labels": labels, "response_start": prompt})
    return collate_kd_batch(rows)


def alone(model: Decoder, batch: dict[str, Any]) -> list[Tensor]:
    """For each labelled token, the logits of the row before it, from that sequence alone and without padding."""
    rows = []
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        length = int(mask.sum())
        with torch.no_grad():
            hidden = model(ids[:length], torch.arange(length), dense_attention(1, length, "causal"))
            logits = model.head(hidden)
        rows += [logits[at - 1] for at in range(1, length) if labels[at] != -100]
    return rows


@pytest.mark.parametrize("rows", [1, 5, 1024])
def test_logits_are_those_of_each_row_alone(small: LocalTeacher, rows: int) -> None:
    batch = batch_of([(3, 7), (10, 2), (1, 20), (5, 1)])
    chunked = LocalTeacher(small.model, small.tokenizer, rows=rows)
    found = chunked.logits(batch).logits
    wanted = torch.stack(alone(small.model, batch))
    assert found.shape == (30, VOCAB)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert not found.requires_grad
    assert not found.is_inference()  # a loss may save it for its backward pass


def test_some_sequences_at_a_time_give_the_same(small: LocalTeacher, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batch_of([(3, 7), (10, 2), (1, 20)])
    whole = small.logits(batch).logits
    monkeypatch.setattr("dfastllm.distill.teacher.local.TOKENS", 25)
    torch.testing.assert_close(small.logits(batch).logits, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("k", [1, 8, VOCAB])
def test_the_best_and_the_mass_of_the_others_are_exact(small: LocalTeacher, k: int) -> None:
    batch = batch_of([(3, 7), (10, 2)])
    found = small.topk(batch, k)
    wanted = torch.stack(alone(small.model, batch)).double().log_softmax(-1)
    values, ids = wanted.topk(k)
    assert torch.equal(found.ids, ids)
    torch.testing.assert_close(found.logprobs.double(), values, rtol=0, atol=5e-6)
    rest = wanted.exp().sum(-1) - values.exp().sum(-1)
    torch.testing.assert_close(1 - found.logprobs.double().exp().sum(-1), rest, rtol=0, atol=2e-6)
    assert found.logprobs.dtype == torch.float32


def test_other_rows_may_be_asked_for(small: LocalTeacher) -> None:
    batch = batch_of([(3, 7), (10, 2)])
    wanted = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    wanted[0, 4] = wanted[1, 0] = True
    found = small.topk(batch, 3, wanted)
    every = torch.ones_like(wanted)
    whole = small.topk(batch, 3, every)
    assert torch.equal(found.ids, whole.ids[[4, batch["input_ids"].shape[1]]])
    with pytest.raises(ValidationError, match="rows has the shape"):
        small.topk(batch, 3, wanted[:, 1:])


def test_what_cannot_teach_says_so(small: LocalTeacher, bytes_tokenizer: Tokenizer) -> None:
    batch = batch_of([(3, 7)])
    canvas = LocalTeacher(model_of(bytes_tokenizer, "llada"), bytes_tokenizer)
    with pytest.raises(UnsupportedError, match="of kind diffusion; distributions of next tokens"):
        canvas.logits(batch)
    with pytest.raises(ContextLengthError, match="rows of 65 tokens"):
        small.logits(batch_of([(60, 5)]))
    for k in (0, VOCAB + 1):
        with pytest.raises(ValidationError, match="k must be in"):
            small.topk(batch, k)
    with pytest.raises(ValidationError, match="rows must be"):
        LocalTeacher(small.model, bytes_tokenizer, rows=0)


def test_vocabularies_must_be_equal(bytes_tokenizer: Tokenizer) -> None:
    check_same_vocabulary(bytes_tokenizer, VOCAB, bytes_tokenizer, VOCAB)
    with pytest.raises(UnsupportedError, match="a vocabulary of 260, the student's of 264"):
        check_same_vocabulary(bytes_tokenizer, VOCAB, bytes_tokenizer, 264)
    renamed = bytes_tokenizer.backend.to_str().replace("<|mask|>", "<|hole|>")
    roles = {"eos_token": "<|end|>", "mask_token": "<|hole|>"}
    masked = Tokenizer(tokenizers.Tokenizer.from_str(renamed), special_tokens=roles)
    check_same_vocabulary(masked, VOCAB, bytes_tokenizer, VOCAB)  # nobody says a mask
    other = byte_tokenizer(special=("<|x|>", "<|y|>"))
    with pytest.raises(UnsupportedError, match=r"2 ids mean other tokens to the teacher, the first is 260: '<\|x\|>'"):
        check_same_vocabulary(other, VOCAB, bytes_tokenizer, VOCAB)
    with pytest.raises(UnsupportedError, match="the student's of 264"):
        LocalTeacher.load("demo-ar", student=Tokenizer.load(resolve("demo-ar")), student_vocab=264)


def test_its_answers_and_its_distributions_agree(tmp_path: Path) -> None:
    """A set from the engine: the answers are those of the engine asked directly, and the log-probabilities beside each
    token those of the plain forward over prompt and answer, as near as the engine's packed weights are."""
    samples = [draw("validation", 3, index) for index in range(10)]
    rows = [
        {"id": str(at), "prompt": list(s.messages), **({"tools": list(s.tools)} if s.tools else {})}
        for at, s in enumerate(samples)
    ]
    prompts, out = tmp_path / "p.jsonl", tmp_path / "a.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = Tokenizer.load(resolve("demo-ar"))
    with LocalTeacher.load("demo-ar", student=tokenizer, max_tokens=64, top_logprobs=5) as teacher:
        summary = collect(prompts, out, teacher, tokenizer, show=False)
        llm = teacher._engine()
        assert isinstance(llm, LLM)
        found = {row["id"]: row for row in map(json.loads, out.read_text().splitlines()[1:])}
        assert summary.accepted == summary.with_logprobs == len(found) >= 8
        for at, sample in enumerate(samples):
            if str(at) not in found:
                continue
            wanted = llm.chat(list(sample.messages), teacher.sampling, tools=list(sample.tools) or None)[0]
            assert found[str(at)]["teacher_text"] == wanted.text
            topk = found[str(at)]["teacher_topk"]
            ids = tokenizer.encode(wanted.text)
            assert [token[0][0] for token in topk] == ids  # greedy: the best is the one that was taken
            prompt = list(wanted.prompt_tokens)
            line = torch.tensor([[*prompt, *ids]])
            labels = line.clone()
            labels[:, : len(prompt)] = -100
            plain = teacher.topk({"input_ids": line, "labels": labels}, 5)
            told = torch.tensor([[p for _, p in token] for token in topk])
            assert (told[:, 0] - plain.logprobs[:, 0]).abs().max() < 0.1
            assert all(math.fsum(math.exp(p) for _, p in token) <= 1 + 1e-4 for token in topk)
        again = collect(prompts, out, teacher, tokenizer, show=False)
    assert (again.had, again.accepted) == (10, 0)
