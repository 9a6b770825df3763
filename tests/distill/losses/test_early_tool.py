"""The early tool call: cross entropy and prior against float64, the ids that open a call, the ramp."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dfastllm
from dfastllm.distill.losses import Hidden, early_tool_call_loss, early_tool_ramp, envelope_ids, warmup_steps
from dfastllm.errors import ValidationError
from dfastllm.text import ChatTemplates, Tokenizer
from tests.kit import brute_losses
from tests.text.conftest import byte_level, llama2

HERMES = (
    "{%- if tools %}{{ tools | tojson }}{% endif -%}{%- for m in messages -%}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{%- for call in m.tool_calls or [] -%}<tool_call>\n{{ call.function | tojson }}\n</tool_call>{%- endfor -%}"
    "<|im_end|>\n{%- endfor -%}"
)
B, T, P = 3, 9, 4


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(Path(dfastllm.__file__).parent / "shipped" / "demo-ar")


@pytest.fixture
def logits(tokenizer: Tokenizer) -> Tensor:
    return torch.randn(B, T, tokenizer.vocab_size, dtype=torch.float64)


def ids() -> Tensor:
    return torch.zeros(B, T, dtype=torch.int64)


def openers(tokenizer: Tokenizer, *openings: str) -> list[int]:
    """Which ids open a call, one after the other."""
    texts = {id: tokenizer.decode([id], skip_special=False).strip() for id in range(tokenizer.vocab_size)}
    return [id for id, text in texts.items() if text[:1] in ("{", "[") or any(map(text.startswith, openings))]


def nll(row: Tensor, wanted: list[int]) -> float:
    """-log of the probability of any of these ids."""
    return -math.log(brute_losses.softmax(row.detach().numpy())[wanted].sum())


def test_cross_entropy_and_prior_are_their_definitions(tokenizer: Tokenizer, logits: Tensor) -> None:
    """Row 0 has a prefix of three tokens, row 1 should use a tool and has none, row 2 should not; each response begins
    elsewhere."""
    should = torch.tensor([True, True, False])
    starts = torch.tensor([2, 5, 0])
    prefix = torch.tensor([[7, 8, 9, -100], [-100] * 4, [1, 2, 3, 4]])
    x = logits.requires_grad_()
    loss, found = early_tool_call_loss(x, ids(), should, tokenizer, prefix, response_start=starts, chunk=2)
    ce = brute_losses.cross_entropy(x.detach()[0, 2:5].numpy(), [7, 8, 9], [1 / 3] * 3)
    prior = nll(x[1, 5], openers(tokenizer, "<tool_call>"))
    assert loss.item() == pytest.approx(0.2 * ce + 0.02 * prior, abs=1e-12)
    assert found == {
        "early_tool.frac_should_use": pytest.approx(2 / 3),
        "early_tool.frac_target_available": 0.5,
        "early_tool.mean_json_prior_nll0": pytest.approx(prior),
    }
    (slope,) = torch.autograd.grad(loss, x)
    touched = (slope.abs().sum(-1) > 0).nonzero().tolist()
    assert touched == [[0, 2], [0, 3], [0, 4], [1, 5]]
    assert (slope[1, 5, openers(tokenizer, "<tool_call>")] < 0).all()


def test_its_gradient_is_finite_differences(tokenizer: Tokenizer) -> None:
    """In twenty directions, which is enough for a derivative that is linear in them."""
    should, prefix = torch.tensor([True, True, True]), torch.tensor([[5, 6], [-100, -100], [9, -100]])
    x = torch.randn(B, T, tokenizer.vocab_size, dtype=torch.float64, requires_grad=True)

    def loss(x: Tensor) -> Tensor:
        return early_tool_call_loss(x, ids(), should, tokenizer, prefix)[0]

    (slope,) = torch.autograd.grad(loss(x), x)
    with torch.no_grad():
        for _ in range(20):
            way = torch.randn_like(x)
            step = (loss(x + 1e-5 * way) - loss(x - 1e-5 * way)).item() / 2e-5
            assert step == pytest.approx((slope * way).sum().item(), abs=1e-8)


@pytest.mark.parametrize(
    ("count", "start", "length"),
    [(25, 0, 4), (2, 0, 2), (25, 6, 3), (25, T - 1, 1), (1, 3, 1)],
)
def test_how_many_tokens_count(tokenizer: Tokenizer, logits: Tensor, count: int, start: int, length: int) -> None:
    """K = min(N, P, rows from the response's start on)."""
    prefix = torch.tensor([[11, 12, 13, 14]] * B)
    starts = torch.full((B,), start)
    x = logits.requires_grad_()
    loss, _ = early_tool_call_loss(
        x, ids(), torch.tensor([True, False, False]), tokenizer, prefix, N=count, response_start=starts
    )
    rows = x.detach()[0, start : start + length].numpy()
    wanted = brute_losses.cross_entropy(rows, [11, 12, 13, 14][:length], [1 / length] * length)
    assert loss.item() == pytest.approx(0.2 * wanted)


def test_a_response_outside_the_rows(tokenizer: Tokenizer, logits: Tensor) -> None:
    """One that a cut left nothing of has neither a target nor a prior."""
    x = logits.requires_grad_()
    starts, prefix = torch.tensor([T, T + 3, T]), torch.tensor([[11, 12, 13, 14]] * B)
    for given in (prefix, None):
        loss, found = early_tool_call_loss(
            x, ids(), torch.ones(B, dtype=torch.bool), tokenizer, given, response_start=starts
        )
        assert loss.item() == 0
        assert found["early_tool.frac_target_available"] == 0
        assert torch.equal(torch.autograd.grad(loss, x)[0], torch.zeros_like(x))


def test_none_should_use_a_tool(tokenizer: Tokenizer, logits: Tensor) -> None:
    x = logits.requires_grad_()
    prefix = torch.tensor([[11, 12, 13, 14]] * B)
    loss, found = early_tool_call_loss(x, ids(), torch.zeros(B, dtype=torch.bool), tokenizer, prefix)
    assert loss.item() == 0
    assert loss.requires_grad
    loss.backward()  # type: ignore[no-untyped-call]
    assert set(found.values()) == {0.0}


def test_the_ramp_and_the_weights(tokenizer: Tokenizer, logits: Tensor) -> None:
    should, prefix = torch.tensor([True, True, True]), torch.tensor([[7, 8, 9, 3], [-100] * 4, [1, 2, 3, 4]])

    def value(**given: float) -> float:
        return early_tool_call_loss(logits, ids(), should, tokenizer, prefix, **given)[0].item()  # type: ignore[arg-type]

    ramp = [value(ramp_t=t) for t in (0.0, 0.1, 0.5, 1.0)]
    assert ramp[0] == 0
    assert ramp == sorted(ramp)
    assert ramp[2] == pytest.approx(ramp[3] / 2)
    assert value(ce_weight=0.4) - value() == pytest.approx(value(json_prior_weight=0))
    assert value(ce_weight=0) == pytest.approx(value() - value(json_prior_weight=0))


def test_the_ramp_of_a_step() -> None:
    assert warmup_steps(40) == 200
    assert warmup_steps(2.5, 2) == 5
    assert [early_tool_ramp(step, 200) for step in (0, 50, 200, 999)] == [0.0, 0.25, 1.0, 1.0]
    assert early_tool_ramp(0, 0) == 1.0
    with pytest.raises(ValidationError, match="optimizer_step"):
        early_tool_ramp(-1, 200)


def test_from_hidden_rows(tokenizer: Tokenizer) -> None:
    rows, weight = (
        torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((B, T, 6), (tokenizer.vocab_size, 6))
    )
    should, prefix = torch.tensor([True, True, False]), torch.tensor([[7, 8, 9, 3], [-100] * 4, [1, 2, 3, 4]])
    results = []
    for student in (rows @ weight.T, Hidden.linear(rows, weight)):
        loss, found = early_tool_call_loss(student, ids(), should, tokenizer, prefix)
        results.append((loss.detach(), found, torch.autograd.grad(loss, (rows, weight))))
    torch.testing.assert_close(results[0], results[1])


def test_the_ids_that_open_a_call(tokenizer: Tokenizer) -> None:
    found = envelope_ids(tokenizer)
    assert found.tolist() == openers(tokenizer, "<tool_call>")
    assert {tokenizer.encode(text)[0] for text in ('{"name', "[1", "<tool_call>", ' {"')} <= {*found.tolist()}
    assert tokenizer.encode("Hello")[0] not in found
    assert envelope_ids(tokenizer) is found, "looked up once"


@pytest.mark.parametrize("make", [byte_level, llama2])
def test_an_opening_of_several_tokens(make: Any) -> None:
    """Its first token opens a call where the template teaches that form alone; a plain one teaches brackets only."""
    backend = make()  # once: training breaks ties as it likes
    taught, plain = Tokenizer(backend, templates=ChatTemplates({"default": HERMES})), Tokenizer(backend)
    brackets = openers(plain)
    assert envelope_ids(plain).tolist() == brackets
    first = next(id for id in taught.encode("<tool_call>") if taught.decode([id]).strip())
    assert envelope_ids(taught).tolist() == sorted({*brackets, *openers(taught, "<tool_call>"), first})


def test_where_every_form_is_read(tokenizer: Tokenizer) -> None:
    """A template that is the message alone: an opening counts where it is one token, a piece of one says nothing."""
    alone = ChatTemplates({"default": "{% for m in messages %}{{ m.content }}{% endfor %}"})
    backend = byte_level()
    assert len(Tokenizer(backend).encode("<tool_call>")) > 1
    assert envelope_ids(Tokenizer(backend, templates=alone)).tolist() == openers(Tokenizer(backend))
    whole = Tokenizer(tokenizer.backend, templates=alone)
    assert envelope_ids(whole).tolist() == openers(whole, "<tool_call>") != openers(whole)


def test_a_tokenizer_of_hugging_face(tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend)
    theirs.chat_template = tokenizer.templates.source()
    assert envelope_ids(theirs).tolist() == envelope_ids(tokenizer).tolist()


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input_ids": torch.zeros(B, T + 1)}, "input_ids"),
        ({"tool_should_be_used": torch.ones(B + 1)}, "tool_should_be_used"),
        ({"teacher_prefix_ids": torch.zeros(B - 1, P, dtype=torch.int64)}, "teacher_prefix_ids"),
        ({"teacher_prefix_ids": torch.full((B, P), 10**6)}, "targets"),
        ({"response_start": torch.zeros(B, 1, dtype=torch.int64)}, "response_start"),
        ({"response_start": torch.full((B,), -1)}, "response_start"),
        ({"N": 0}, "N"),
        ({"ce_weight": -0.1}, "ce_weight"),
        ({"json_prior_weight": math.nan}, "json_prior_weight"),
        ({"ramp_t": 1.5}, "ramp_t"),
        ({"ramp_t": math.nan}, "ramp_t"),
        ({"tokenizer": object()}, "tokenizer"),
        ({"logits": torch.zeros(B, T, 20)}, "tokenizer"),
        ({"logits": torch.zeros(B * T, 1280)}, "logits"),
    ],
)
def test_what_is_refused(tokenizer: Tokenizer, change: dict[str, Any], param: str) -> None:
    given = {
        "logits": torch.zeros(B, T, tokenizer.vocab_size),
        "input_ids": ids(),
        "tool_should_be_used": torch.ones(B, dtype=torch.bool),
        "tokenizer": tokenizer,
    }
    with pytest.raises(ValidationError) as error:
        early_tool_call_loss(**{**given, **change})
    assert error.value.param == param
