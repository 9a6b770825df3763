"""Drafts chosen from left to right with a bigram head: the tokens that a plain loop in float64 chooses, whoever drafts
beside, and answers that are plain decoding's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dfastllm import assemble
from dfastllm.core import Draft, ModelInfo, Request, SamplingParams, SequenceState, SpeculativeParams, StepStats
from dfastllm.decode.draft.verify import Cell, draw_of
from dfastllm.decode.sampling import draw
from dfastllm.engine import Engine, EngineConfig
from dfastllm.engine.speculate import DraftCanvas
from dfastllm.engine.speculate.bigram import CANDIDATES, Wanted, chained
from dfastllm.errors import ValidationError
from dfastllm.kernels.rows import DenseRows
from dfastllm.models import tiny
from dfastllm.models.bigram import Bigram
from tests.engine.speculate.test_shortlist import OPTIONS, answers
from tests.kit.fake import FakeModel

VOCAB, MASK, EOS = 200, 199, 198
INFO = ModelInfo(
    name="t", family="t", kind="ar", vocab_size=VOCAB, max_len=512, layers=1, kv_heads=1, head_dim=4, eos_ids=(EOS,)
)


def head(vocab: int = VOCAB, rank: int = 6, scale: float = 1.5, seed: int = 1) -> Bigram:
    before, after = scale * torch.randn(2, vocab, rank, generator=torch.Generator().manual_seed(seed))
    return Bigram(before, after)


def wanted(lengths: list[int], **options: Any) -> list[Wanted]:
    found = []
    for n, most in enumerate(lengths):
        prompt = (5 + n, 9, 3 * n)
        sampling = SamplingParams(**{"temperature": 0.0, "max_tokens": 20, "seed": n, **options})
        found.append((SequenceState(Request(f"r{n}", prompt, sampling), INFO, list(prompt), seed=n), most))
    return found


def logits_of(lengths: list[int], seed: int = 0) -> Tensor:
    return 2.0 * torch.randn(sum(lengths), VOCAB, generator=torch.Generator().manual_seed(seed))


def weighed(row: Tensor, given: Bigram, previous: int) -> Tensor:
    """float64 [vocab]: what the head makes of one row's logits, minus infinity where a token is no candidate."""
    row = row.double().clone()
    row[MASK] = -torch.inf
    kept = row.sort(descending=True, stable=True).indices[:CANDIDATES]
    out = torch.full_like(row, -torch.inf)
    for id in kept.tolist():
        term = sum(float(a) * float(b) for a, b in zip(given.before[previous], given.after[id], strict=True))
        out[id] = row[id] + term
    return out


def by_hand(given: Bigram, drafts: list[Wanted], logits: Tensor) -> list[list[int]]:
    """Greedy drafts, one token after the other."""
    found, at = [], 0
    for seq, most in drafts:
        said: list[int] = []
        for ahead in range(most):
            previous = said[-1] if said else seq.tokens[-1]
            said.append(int(weighed(logits[at + ahead], given, previous).argmax()))
        found.append(said)
        at += most
    return found


def test_greedy_drafts_are_the_plain_loops() -> None:
    lengths = [5, 1, 8, 3]
    drafts, changed = wanted(lengths), 0
    for seed in range(12):
        given, logits = head(seed=seed), logits_of(lengths, seed)
        got = [[p.token for p in one] for one in chained(given, drafts, DenseRows(logits.clone()), (MASK,))]
        assert got == by_hand(given, drafts, logits)
        assert MASK not in [token for one in got for token in one]
        changed += [t for one in got for t in one] != logits.argmax(-1).tolist()
    assert changed == 12, "the head changed no token, so nothing was tested"


def test_a_draft_is_the_same_alone_and_beside_others() -> None:
    """To the bit also where its distribution is kept (rejection), which decides what comes."""
    lengths = [4, 7, 2, 6]
    given, logits = head(), logits_of(lengths)
    for options in ({}, {"temperature": 0.8, "top_k": 9}):
        drafts = wanted(lengths, **options)
        for n in range(0, 4, 2):
            rejecting = SpeculativeParams("diffusion", 8, acceptance="rejection")
            seq = drafts[n][0]
            request = replace(seq.request, speculative=rejecting)
            drafts[n] = (SequenceState(request, INFO, seq.tokens, n), lengths[n])
        together = chained(given, drafts, DenseRows(logits.clone()), (MASK,))
        at = 0
        for draft, most, beside in zip(drafts, lengths, together, strict=True):
            (alone,) = chained(given, [draft], DenseRows(logits[at : at + most].clone()), (MASK,))
            assert [p.token for p in alone] == [p.token for p in beside]
            for one, other in zip(alone, beside, strict=True):
                assert (one.probs is None) == (other.probs is None)
                assert one.probs is None or other.probs is None or torch.equal(one.probs, other.probs)
            at += most


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.3},
        {"frequency_penalty": 0.9},
        {"temperature": 0.9, "min_tokens": 12},
    ],
)
def test_other_drafts_are_drawn_with_the_requests_own_noise(options: dict[str, Any]) -> None:
    """Each token is the request's keyed draw from the weighed logits, the draft before it counted as text."""
    lengths = [5, 3]
    given, logits, drafts = head(), logits_of(lengths), wanted(lengths, **options)
    got = [[p.token for p in one] for one in chained(given, drafts, DenseRows(logits.clone()), (MASK,))]
    at = 0
    for (seq, most), tokens in zip(drafts, got, strict=True):
        said: list[int] = []
        for ahead in range(most):
            row = weighed(logits[at + ahead], given, said[-1] if said else seq.tokens[-1]).float().clamp(min=-1e30)
            cell = Cell(seq, Draft(tuple(said), len(seq.tokens)), ahead)
            said.append(int(draw(row[None], [draw_of(cell)])[0]))
        assert tokens == said
        at += most


def test_tokens_that_are_not_allowed_are_not_drafted() -> None:
    lengths = [6]
    allowed = tuple(range(0, 190, 2))
    drafts = wanted(lengths, allowed_token_ids=allowed)
    for seed in range(5):
        (got,) = chained(head(), drafts, DenseRows(logits_of(lengths, seed)), (MASK,))
        assert {p.token for p in got} <= set(allowed)


@pytest.mark.parametrize("acceptance", ["coupled", "rejection"])
@pytest.mark.parametrize("family", ["llada", "sdar"])
def test_answers_are_plain_decodings(family: str, acceptance: str) -> None:
    """On packed models, with options and without. The head is strong, so drafts are others than without it."""
    config = EngineConfig(kv_tokens=2048)
    target, masked = assemble.pack(tiny("llama", seed=3)), assemble.pack(tiny(family, seed=4))
    given = head(masked.info.vocab_size, scale=3.0)
    asked = SpeculativeParams("diffusion", 5, adaptive=False, acceptance=acceptance)  # type: ignore[arg-type]
    said: dict[bool, list[tuple[int, ...]]] = {}
    for has in (False, True):
        drafter = Overheard(masked, config, bigram=given if has else None)
        engine = Engine(target, None, config, drafters={"diffusion": drafter})
        plain, drafted = (answers(engine, speculative) for speculative in (None, asked))
        greedy = [n for n, options in enumerate(OPTIONS) if not options.get("temperature")]
        for n in range(len(OPTIONS)) if acceptance == "coupled" else greedy:
            assert drafted[n] == plain[n]
        said[has] = drafter.said
    assert said[True]
    assert said[True] != said[False]
    assert masked.info.mask_id not in {token for draft in said[True] for token in draft}


class Overheard(DraftCanvas):
    """Keeps what it drafted."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.said: list[tuple[int, ...]] = []

    def propose(self, wanted: Any) -> list[Draft]:
        drafts = super().propose(wanted)
        self.said += [draft.tokens for draft in drafts]
        return drafts


def test_a_head_that_knows_the_pairs_is_right() -> None:
    """A target whose every token follows from the one before it, and a drafter that knows nothing else than its head:
    all that it drafts stands, also beyond one block. Without the head hardly anything does."""
    target = Cyclic()
    vocab = target.info.vocab_size
    pairs = torch.zeros(vocab, vocab)
    pairs[torch.arange(vocab), target.next] = 60.0
    given = Bigram(pairs, torch.eye(vocab))
    config = EngineConfig(kv_tokens=512, page_size=4)
    for kind in ("diffusion", "block"):
        stood = {}
        for label, bigram in (("with", given), ("without", None)):
            drafter = Flat(kind), config
            engine = Engine(target, config=config, drafters={"diffusion": DraftCanvas(*drafter, bigram=bigram)})
            drafts: list[tuple[int, int]] = []
            engine.subscribe(Collected(drafts))
            sampling = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
            engine.add(Request("r", (3, 4, 5), sampling, speculative=SpeculativeParams("diffusion", 6, adaptive=False)))
            said = [token for event in drain(engine) for token in event.token_ids]
            wanted = [5]
            for _ in range(30):
                wanted.append(int(target.next[wanted[-1]]))
            assert said == wanted[1:]
            stood[label] = sum(accepted for _, accepted in drafts) / sum(drafted for drafted, _ in drafts)
        assert stood["with"] == 1.0
        assert stood["without"] < 0.3


class Collected:
    """Keeps what became of drafts, (drafted, accepted) each."""

    def __init__(self, into: list[tuple[int, int]]) -> None:
        self.into = into

    def __call__(self, stats: StepStats) -> None:
        self.into.extend(stats.drafts)


def drain(engine: Engine) -> list[Any]:
    found = []
    while engine.has_work:
        found += engine.step()
    return found


class Cyclic(FakeModel):
    """A target whose next token is a permutation of the last one, of tokens below 32."""

    def __init__(self) -> None:
        super().__init__("ar")
        self.next = torch.arange(self.info.vocab_size)
        self.next[:32] = (self.next[:32] * 5 + 7) % 32

    def __call__(self, ids: Tensor, positions: Tensor, attend: Any) -> Tensor:
        super().__call__(ids, positions, attend)
        return ids.double().unsqueeze(-1)

    def head(self, hidden: Tensor) -> Tensor:
        logits = torch.zeros(len(hidden), self.info.vocab_size, dtype=torch.float64)
        return logits.scatter_(1, self.next[hidden[:, 0].long()][:, None], 9.0)


class Flat(FakeModel):
    """A masked model to which all tokens below 32 are alike, and others unlikely."""

    def head(self, hidden: Tensor) -> Tensor:
        logits = torch.zeros(len(hidden), self.info.vocab_size, dtype=torch.float64)
        logits[:, 32:] = -50.0
        return logits


def test_a_head_of_another_vocabulary_is_refused() -> None:
    with pytest.raises(ValidationError, match="a bigram head of 47 tokens; fake has 48") as error:
        DraftCanvas(FakeModel("diffusion"), EngineConfig(), bigram=head(47))
    assert error.value.param == "bigram"
