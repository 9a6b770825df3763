"""What of a draft stands. Rejection: the rule by exact enumeration on a tiny vocabulary, its draws by their frequencies
over many seeds. Coupled: plain decoding's token at every cell."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from dfastllm.core import Draft, Request, SamplingParams, SequenceState, SpeculativeParams
from dfastllm.decode.draft import verify
from dfastllm.decode.draft.proposal import pick
from dfastllm.decode.draft.verify import Cell, cells_of, choose, odds, standing
from dfastllm.kernels.rows import DenseRows
from tests.kit.driver import info

WORDS = 3
Table = Callable[[tuple[int, ...]], Tensor]  # prefix -> distribution float64 [words]


def table(seed: int, sparse: bool = False, words: int = WORDS) -> Table:
    """A distribution for every prefix; sparse: one word of each impossible."""

    def of(prefix: tuple[int, ...]) -> Tensor:
        g = torch.Generator().manual_seed(hash((seed, *prefix)) % (1 << 40))
        logits = 1.5 * torch.randn(words, generator=g, dtype=torch.float64)
        if sparse:
            logits[int(torch.randint(words, (1,), generator=g))] = float("-inf")
        return torch.softmax(logits, -1)

    return of


def joint(p: Table, length: int) -> dict[tuple[int, ...], float]:
    out = {}
    for text in itertools.product(range(WORDS), repeat=length):
        out[text] = float(np.prod([float(p(text[:i])[text[i]]) for i in range(length)]))
    return out


def speculated(
    p: Table, q: Table, k: int, prefix: tuple[int, ...], length: int, share: float
) -> Counter[tuple[int, ...]]:
    """Exact distribution of the first `length` tokens when drafts of k tokens are judged by `odds`: every draft, every
    judgement, every draw of the rest, each with its probability."""
    out: Counter[tuple[int, ...]] = Counter()  # of probabilities
    if share == 0:
        return out
    if len(prefix) >= length:
        out[prefix[:length]] = share  # type: ignore[assignment]
        return out
    for draft in itertools.product(range(WORDS), repeat=k):
        chance, text = share, prefix
        for x in draft:
            chance *= float(q(text)[x])
            text = (*text, x)
        text = prefix
        for x in draft:
            one = torch.tensor([x])
            stands, rest = odds(p(text)[None], q(text)[None], one)
            lost = chance * (1 - float(stands))
            if lost > 0:
                for y, w in enumerate((rest[0] / rest[0].sum()).tolist()):
                    out += speculated(p, q, k, (*text, y), length, lost * w)
            chance, text = chance * float(stands), (*text, x)
        for y, w in enumerate(p(text).tolist()):  # all stand: one more from the target
            out += speculated(p, q, k, (*text, y), length, chance * w)
    return out


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("sparse", [(False, False), (True, False), (False, True), (True, True)])
def test_rejection_gives_exactly_the_targets_joint_distribution(k: int, sparse: tuple[bool, bool]) -> None:
    p, q = table(1, sparse[0]), table(2, sparse[1])
    length = 4 if k < 3 else 3
    wanted, got = joint(p, length), speculated(p, q, k, (), length, 1.0)
    assert sum(got.values()) == pytest.approx(1, abs=1e-12)
    for text, probability in wanted.items():
        assert got[text] == pytest.approx(probability, abs=1e-9)


@pytest.mark.parametrize("k", [1, 3])
def test_the_enumeration_notices_a_wrong_rule(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing what comes in a rejected token's place from p itself is the usual mistake."""
    right = odds
    monkeypatch.setitem(globals(), "odds", lambda p, q, x: (right(p, q, x)[0], p))
    p, q = table(1), table(2)
    wanted, got = joint(p, 3), speculated(p, q, k, (), 3, 1.0)
    assert max(abs(got[t] - wanted[t]) for t in wanted) > 1e-3


def test_a_certain_draft_is_rejection_too() -> None:
    """A lookup proposes one token with probability 1."""
    p = table(3)

    def q(prefix: tuple[int, ...]) -> Tensor:
        return torch.nn.functional.one_hot(torch.tensor(len(prefix) % WORDS), WORDS).double()

    got = speculated(p, q, 2, (), 3, 1.0)
    for text, probability in joint(p, 3).items():
        assert got[text] == pytest.approx(probability, abs=1e-9)


# ---- the draws ------------------------------------------------------------------------------------------------------

SEEDS = 24_000
MODEL = info("ar", vocab_size=4, eos_ids=())


def sequences(acceptance: str) -> list[SequenceState]:
    asked = SpeculativeParams("draft_model", acceptance=acceptance)  # type: ignore[arg-type]
    request = Request("r", (1, 2), SamplingParams(temperature=1.0), speculative=asked)
    return [SequenceState(request, MODEL, [1, 2], seed) for seed in range(SEEDS)]


def markov(seed: int) -> Tensor:
    """Logits float32 [4, 4] by the last token."""
    return 1.2 * torch.randn(4, 4, generator=torch.Generator().manual_seed(seed))


def play(target: Tensor, drafter: Tensor, acceptance: str, k: int = 2) -> Counter[tuple[int, int]]:
    """The first two tokens of every seed: drafts of k tokens drawn from one table, judged by another, then plainly."""
    seqs = sequences(acceptance)
    drafts = [Draft((), 2) for _ in seqs]
    probs: list[list[Tensor]] = [[] for _ in seqs]
    last = [2] * len(seqs)
    for _ in range(k):
        cells = [Cell(s, d, len(d.tokens)) for s, d in zip(seqs, drafts, strict=True)]
        found = pick(cells, DenseRows(drafter[last].clone()))
        last = [f.token for f in found]
        drafts = [replace(d, tokens=(*d.tokens, f.token)) for d, f in zip(drafts, found, strict=True)]
        for mine, f in zip(probs, found, strict=True):
            if f.probs is not None:
                mine.append(f.probs)
    drafts = [replace(d, probs=torch.stack(m) if m else None) for d, m in zip(drafts, probs, strict=True)]
    cells = [c for s, d in zip(seqs, drafts, strict=True) for c in cells_of(s, d)]
    rows = [2 if c.ahead == 0 else c.draft.tokens[c.ahead - 1] for c in cells]  # type: ignore[union-attr]
    tokens, _ = choose(cells, DenseRows(target[rows].clone()))
    out: Counter[tuple[int, int]] = Counter()
    more = []
    for number, (seq, draft) in enumerate(zip(seqs, drafts, strict=True)):
        row = tokens[number * (k + 1) : (number + 1) * (k + 1)]
        given = row[: standing(row, draft) + 1]
        seq.tokens += given[:2]
        if len(given) < 2:
            more.append(seq)
    rest, _ = choose([Cell(s) for s in more], DenseRows(target[[s.tokens[-1] for s in more]].clone()))
    for seq, token in zip(more, rest, strict=True):
        seq.tokens.append(token)
    for seq in seqs:
        out[seq.tokens[2], seq.tokens[3]] += 1
    return out


def chi_square(counts: Counter[tuple[int, int]], target: Tensor) -> float:
    p = torch.softmax(target.double(), -1)
    wanted = {(a, b): SEEDS * float(p[2, a] * p[a, b]) for a in range(4) for b in range(4)}
    return sum((counts[cell] - n) ** 2 / n for cell, n in wanted.items())


LIMIT = 37.7  # 15 degrees of freedom, exceeded once in a thousand


def test_frequencies_over_many_seeds_are_the_targets() -> None:
    target, drafter = markov(1), markov(2)
    assert chi_square(play(target, drafter, "rejection"), target) < LIMIT
    assert chi_square(play(target, drafter, "coupled"), target) < LIMIT


def test_frequencies_notice_draws_that_are_not_independent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafting with the judgement's own noise would be wrong under rejection."""
    target, drafter = markov(1), markov(2)
    monkeypatch.setattr(verify, "REST_SALT", verify.DRAFT_SALT)
    assert chi_square(play(target, drafter, "rejection"), target) > 1.5 * LIMIT


def test_a_good_draft_is_accepted_more_often_by_coupling_than_independent_draws_agree() -> None:
    """With the same noise two equal models always agree."""
    target = markov(1)
    seqs = sequences("coupled")[:500]
    found = pick([Cell(s) for s in seqs], DenseRows(target[[2] * 500].clone()))
    tokens, _ = choose([Cell(s) for s in seqs], DenseRows(target[[2] * 500].clone()))
    assert [f.token for f in found] == tokens
    assert all(f.probs is None for f in found)
    assert len(set(tokens)) > 1


def test_coupled_cells_are_plain_decodings_draws() -> None:
    """Each row of a draft that stands, as a plain step there would decide it: penalties count the draft as text."""
    generator = torch.Generator().manual_seed(5)
    for case in range(40):
        sampling = SamplingParams(
            temperature=(0.0, 0.9)[case % 2],
            frequency_penalty=(0.0, 1.3)[case % 3 == 0],
            repetition_penalty=(1.0, 1.7)[case % 5 == 0],
            min_tokens=case % 4,
            logit_bias={3: 2.0} if case % 7 == 0 else {},
            logprobs=2,
        )
        model = info("ar", vocab_size=12, eos_ids=(1,))
        request = Request("r", (5, 6), sampling, speculative=SpeculativeParams("ngram"))
        seq = SequenceState(request, model, [5, 6, 7], seed=case)
        logits = 2 * torch.randn(4, 12, generator=generator)
        plain, records = [], []
        state = replace(seq, tokens=list(seq.tokens))
        for row in range(4):
            (token,), (record,) = choose([Cell(state)], DenseRows(logits[row : row + 1].clone()))
            plain.append(token)
            records.append(record)
            state.tokens.append(token)
        draft = Draft(tuple(plain[:3]), 3)
        tokens, kept = choose(cells_of(seq, draft), DenseRows(logits.clone()))
        assert tokens == plain
        assert kept == records
        assert standing(tokens, draft) == 3


def test_standing_is_the_longest_matching_prefix() -> None:
    draft = Draft((4, 5, 6), 9)
    assert standing([4, 5, 6, 1], draft) == 3
    assert standing([4, 5, 7, 1], draft) == 2
    assert standing([9, 5, 6, 1], draft) == 0


def test_proposals_stay_within_the_targets_vocabulary_and_off_the_mask() -> None:
    for temperature in (0.0, 1.0):
        request = Request("r", (1,), SamplingParams(temperature=temperature))
        seq = SequenceState(request, MODEL, [1], seed=3)
        wide = torch.tensor([[0.0, 1.0, 9.0, 2.0, 50.0, 60.0]])  # ids 4 and 5 are padding, 2 the drafter's mask
        (found,) = pick([Cell(seq)], DenseRows(wide.clone()), (2,))
        assert found.token in (0, 1, 3)
        narrow = torch.tensor([[0.0, 5.0]])
        (found,) = pick([Cell(seq)], DenseRows(narrow.clone()), ())
        assert found.token in (0, 1)


def test_the_distribution_of_a_proposal_is_what_it_was_drawn_from() -> None:
    asked = SpeculativeParams("draft_model", acceptance="rejection")
    request = Request("r", (1,), SamplingParams(temperature=0.7, top_k=2), speculative=asked)
    seqs = [SequenceState(request, MODEL, [1], seed) for seed in range(4000)]
    logits = torch.tensor([[0.3, 1.0, -0.5, 0.9]])
    found = pick([Cell(s) for s in seqs], DenseRows(logits.expand(4000, 4).clone()))
    top = torch.softmax(torch.tensor([1.0, 0.9], dtype=torch.float64) / 0.7, -1)
    wanted = torch.tensor([0, top[0], 0, top[1]])
    assert found[0].probs is not None
    torch.testing.assert_close(found[0].probs.double(), wanted.double(), atol=1e-6, rtol=0)
    share = np.mean([f.token == 1 for f in found])
    assert abs(share - float(top[0])) < 4 * np.sqrt(0.25 / 4000)
