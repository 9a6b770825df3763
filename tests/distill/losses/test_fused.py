"""One pass over rows: the same for every cutting, from hidden rows as from logits, and flat in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dfastllm.distill.losses import (
    DIVERGENCES,
    Dense,
    Hidden,
    RowTerms,
    Sparse,
    Student,
    divergence_from_rows,
    end_logprobs,
    row_terms,
    token_divergence,
)
from dfastllm.distill.qat import QatConfig, prepare_qat
from dfastllm.errors import ValidationError
from dfastllm.models import Ids, build, describe, tiny_config

ROWS, WIDTH, IDS = 7, 5, 11


def teachers() -> list[Dense | Sparse]:
    dense = Dense(torch.randn(ROWS, IDS, dtype=torch.float64))
    log_p, ids = dense.logits.log_softmax(-1).topk(3, -1)
    return [dense, Sparse(ids, log_p)]


def mixed(found: RowTerms) -> Tensor:
    """A scalar that needs each result of each row in its own measure."""
    n, j = found.picked.shape
    by = torch.linspace(-1, 2, n, dtype=found.logsumexp.dtype)
    terms = found.divergence * by + found.logsumexp.square() * by.flip(0)
    return terms.sum() + (found.picked * torch.arange(1, n * j + 1).view(n, j)).sum()


def of(student: Student, wanted: tuple[Tensor, ...], **given: Any) -> tuple[Tensor, ...]:
    """The scalar and its gradient by what is wanted."""
    result = mixed(row_terms(student, picks=torch.arange(ROWS * 2).view(ROWS, 2) % IDS, **given))
    return result.detach(), *torch.autograd.grad(result, wanted)


def test_what_is_found_is_what_torch_says() -> None:
    x = torch.randn(2, 3, IDS, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([4, 0, 5])
    picks = torch.tensor([[1, 1], [10, 0], [3, 4]])
    found = row_terms(x, rows=rows, picks=picks)
    flat = x.view(-1, IDS)[rows]
    assert torch.equal(found.divergence, torch.zeros(3))
    torch.testing.assert_close(found.logsumexp, flat.logsumexp(-1))
    torch.testing.assert_close(found.picked, flat.gather(1, picks))
    (slope,) = torch.autograd.grad(mixed(found), x)
    (wanted,) = torch.autograd.grad(mixed(RowTerms(torch.zeros(3), flat.logsumexp(-1), flat.gather(1, picks))), x)
    torch.testing.assert_close(slope, wanted)
    assert torch.equal(slope[0, 1:], torch.zeros(2, IDS)), "rows that were not asked for"


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("form", [0, 1], ids=["dense", "sparse"])
def test_every_cutting_gives_the_same(kind: str, form: int) -> None:
    x = torch.randn(ROWS, IDS, requires_grad=True)
    teacher = teachers()[form]
    whole = of(x, (x,), teacher=teacher, kind=kind)
    for chunk in (1, 3, ROWS):
        found = of(x, (x,), teacher=teacher, kind=kind, chunk=chunk)
        torch.testing.assert_close(found, whole, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("form", [0, 1], ids=["dense", "sparse"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_hidden_rows_give_what_their_logits_give(kind: str, form: int, dtype: torch.dtype) -> None:
    teacher = teachers()[form]
    rows, weight, bias = (
        torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((ROWS, WIDTH), (IDS, WIDTH), (IDS,))
    )
    wanted = (rows, weight, bias)
    logits = 3 * torch.tanh(F.linear(rows, weight, bias) / 3)
    plain = of(logits, wanted, teacher=teacher, kind=kind, temperature=2.0)
    found = of(
        Hidden.linear(rows, weight, bias, softcap=3.0), wanted, teacher=teacher, kind=kind, temperature=2.0, chunk=3
    )
    close = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found, plain, atol=close, rtol=close)


def test_gradients_of_hidden_rows_and_head_are_finite_differences() -> None:
    rows, weight = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((ROWS, WIDTH), (IDS, WIDTH))
    )
    for teacher in teachers():

        def one(rows: Tensor, weight: Tensor, teacher: Dense | Sparse = teacher) -> Tensor:
            return mixed(row_terms(Hidden.linear(rows, weight), teacher=teacher, kind="jsd", chunk=2))

        assert torch.autograd.gradcheck(one, (rows, weight))


def test_any_head() -> None:
    """Of our decoders, tied or not, with factor and cap; a module; one of which nothing is trained; one in bfloat16."""
    for family, changes in (("llama", {"tied": True}), ("gemma2", {}), ("granite", {}), ("llama", {"tied": False})):
        config = tiny_config(family, **changes)
        model = build(config, describe(family, config, Ids()), seed=1)
        rows = torch.randn(4, config.hidden_size, requires_grad=True)
        head = model.embed.weight if model.lm_head is None else model.lm_head.weight
        teacher = torch.randn(4, config.vocab_size)
        plain = token_divergence(model.head(rows), teacher, temperature=2.0)
        found = token_divergence(Hidden.of(model, rows), teacher, temperature=2.0, chunk=3)
        by_plain, by_found = (torch.autograd.grad(one, (rows, head)) for one in (plain, found))
        torch.testing.assert_close(found, plain)
        torch.testing.assert_close(by_found, by_plain, atol=1e-6, rtol=1e-5)

    module = nn.Sequential(nn.Linear(WIDTH, 6), nn.GELU(), nn.Linear(6, IDS)).requires_grad_(False)
    module[2].requires_grad_(True)
    rows = torch.randn(ROWS, WIDTH, requires_grad=True)
    wanted, given = (rows, *module[2].parameters()), teachers()[0]
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            plain = of(module(rows), wanted, teacher=given)
            # In bfloat16 the order of sums is seen: one chunk has the plain one's.
            found = of(Hidden.module(rows, module), wanted, teacher=given, chunk=ROWS if autocast else 3)
        torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_rounds(tied: bool) -> None:
    """Quantisation-aware training puts modules in the head's place: the gradient still reaches its matrix. In chunks it
    is not that of the whole to the last bit: what clipped weights are spared of goes by each chunk's own sign."""
    config = tiny_config("llama", tied=tied, intermediate_size=64)
    model = build(config, describe("llama", config, Ids()), seed=1)
    prepare_qat(model, QatConfig(enabled=True)).enable()
    matrix = dict(model.named_parameters())["embed.weight" if tied else "lm_head.weight"]
    rows, teacher = torch.randn(4, config.hidden_size, requires_grad=True), torch.randn(4, config.vocab_size)
    plain = token_divergence(model.head(rows), teacher)
    wanted = torch.autograd.grad(plain, (rows, matrix))
    assert wanted[1].abs().sum() > 0
    for chunk in (4, 3):
        found = token_divergence(Hidden.of(model, rows), teacher, chunk=chunk)
        assert found.item() == pytest.approx(plain.item(), rel=1e-6)
        slopes = torch.autograd.grad(found, (rows, matrix))
        torch.testing.assert_close(slopes[0], wanted[0], atol=1e-6, rtol=1e-5)
        assert (slopes[1] - wanted[1]).norm() / wanted[1].norm() < (1e-6 if chunk == 4 else 0.1)


def test_a_head_in_bfloat16_sums_its_gradient_in_float32() -> None:
    rows, weight = torch.randn(256, WIDTH).bfloat16(), torch.randn(IDS, WIDTH).bfloat16().requires_grad_()
    exact = weight.detach().double().requires_grad_()
    teacher = torch.randn(256, IDS)
    found = token_divergence(Hidden.linear(rows, weight), teacher, chunk=1, weights=torch.ones(256))
    wanted = token_divergence(Hidden.linear(rows.double(), exact), teacher, weights=torch.ones(256))
    (slope,), (exact_slope,) = torch.autograd.grad(found, weight), torch.autograd.grad(wanted, exact)
    assert slope.dtype == torch.bfloat16
    error = (slope.double() - exact_slope).norm() / exact_slope.norm()
    assert error < 0.01, f"{error}: one chunk after the other in bfloat16 would lose a tenth"


def test_logits_need_not_lie_together() -> None:
    whole = torch.randn(2, 4, IDS, requires_grad=True)
    teacher = torch.randn(2, 4, IDS)
    found = token_divergence(whole[:, :-1], teacher[:, 1:])
    plain = token_divergence(whole[:, :-1].contiguous(), teacher[:, 1:].contiguous())
    assert torch.equal(found, plain)
    assert torch.equal(torch.autograd.grad(found, whole)[0], torch.autograd.grad(plain, whole)[0])


def test_weights_and_means() -> None:
    x, teacher = torch.randn(2, 3, IDS, dtype=torch.float64), torch.randn(2, 3, IDS, dtype=torch.float64)
    each = row_terms(x, teacher=teacher).divergence.view(2, 3)
    assert token_divergence(x, teacher).item() == pytest.approx(each.mean().item())
    weights = torch.tensor([[0.0, 1.0, 2.0], [0.5, 0.0, 0.0]])
    assert token_divergence(x, teacher, weights=weights).item() == pytest.approx((each * weights).sum().item())
    heat = torch.linspace(0.5, 3, 6)
    each = row_terms(x, teacher=teacher, temperature=heat).divergence.view(2, 3)
    found = token_divergence(x, teacher, weights=weights, temperature=heat.view(2, 3))
    assert found.item() == pytest.approx((each * weights).sum().item())
    with pytest.raises(ValidationError, match=r"weights must be \(2, 3\)"):
        token_divergence(x, teacher, weights=torch.ones(3))


def test_divergence_from_rows_takes_a_weight_or_a_module() -> None:
    rows, head, teacher = torch.randn(ROWS, WIDTH), nn.Linear(WIDTH, IDS, bias=False), torch.randn(ROWS, IDS)
    plain = token_divergence(head(rows), teacher, kind="reverse", temperature=2.0)
    for given in (head, head.weight):
        torch.testing.assert_close(divergence_from_rows(rows, given, teacher, kind="reverse", temperature=2.0), plain)


def test_end_logprobs() -> None:
    x = torch.randn(2, 3, IDS, dtype=torch.float64, requires_grad=True)
    wanted = x.log_softmax(-1)[..., [2, 5]].logsumexp(-1)
    found = end_logprobs(x, [5, 2, 5])
    torch.testing.assert_close(found, wanted)
    by = torch.randn(2, 3, dtype=torch.float64)
    torch.testing.assert_close(*(torch.autograd.grad((one * by).sum(), x)[0] for one in (found, wanted)))
    mask = torch.tensor([[0, 1, 1], [0, 0, 0]])
    torch.testing.assert_close(end_logprobs(x, (2, 5), mask), wanted * mask)
    for wrong in ((), (IDS,)):
        with pytest.raises(ValidationError):
            end_logprobs(x, wrong)
    with pytest.raises(ValidationError, match="mask must be"):
        end_logprobs(x, (2,), mask[:1])


@pytest.mark.parametrize("form", ["dense", "hidden"])
def test_memory_is_flat(form: str) -> None:
    """Four times the rows take no more beside inputs and gradient, where one more array of the logits' size would be
    31 MB larger, and the loss written plainly takes ten of them."""
    sizes = ["--rows", "128", "512", "--vocab", "20000", "--hidden", "16", "--chunk", "16"]
    command = [sys.executable, "-m", "dfastllm.distill.losses", *sizes, "--forms", form, "--here"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    few, many = (json.loads(line) for line in output.splitlines())
    assert many["rows"] == 512
    assert many["beyond"] < 40e6
    assert many["beyond"] - few["beyond"] < 12e6
