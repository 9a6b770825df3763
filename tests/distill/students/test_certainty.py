"""Certainty forcing against float64 loops written from the publication, and the states it asks about."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dfastllm import models
from dfastllm.distill.losses.fused import Hidden
from dfastllm.distill.students.certainty import Asked, States, certainty_forcing, states_of
from dfastllm.distill.students.settings import TrajectorySettings
from dfastllm.distill.students.trajectory import Trajectory, window_size
from dfastllm.errors import UnsupportedError
from dfastllm.train.objectives import short_attention
from tests.train.test_objectives import plain_nll


def published(logits: Tensor, targets: Tensor, groups: Tensor, temperature: float) -> tuple[float, float]:
    """dParallel's loss terms, by loops in float64: for the mask and for its complement the mean cross entropy of the
    masked tokens, and the mean entropy of softmax(logits / temperature) where the argmax is the label."""
    ce = entropy = 0.0
    for group in (0, 1):
        nll, sure = [], []
        for row, target, of in zip(logits.double().tolist(), targets.tolist(), groups.tolist(), strict=True):
            if of != group:
                continue
            top = max(row)
            nll.append(top + math.log(sum(math.exp(x - top) for x in row)) - row[target])
            if row.index(top) == target:
                cold = [math.exp((x - top) / temperature) for x in row]
                sure.append(-sum(x / sum(cold) * math.log(x / sum(cold) + 1e-300) for x in cold))
        ce += sum(nll) / len(nll) if nll else 0.0
        entropy += sum(sure) / len(sure) if sure else 0.0
    return ce, entropy


def case(rows: int = 40, vocabulary: int = 13, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logits, targets, weights of 1, groups), about half of the rows right."""
    draw = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(rows, vocabulary, generator=draw)
    random = torch.randint(vocabulary, (rows,), generator=draw)
    targets = torch.where(torch.rand(rows, generator=draw) < 0.5, logits.argmax(-1), random)
    return logits, targets, torch.ones(rows), (torch.rand(rows, generator=draw) < 0.4).long()


@pytest.mark.parametrize("temperature", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("chunk", [1, 7, None])
def test_it_is_the_published_loss(temperature: float, chunk: int | None) -> None:
    logits, targets, weights, groups = case()
    found = certainty_forcing(logits, targets, weights, groups, temperature=temperature, chunk=chunk)
    ce, entropy = published(logits, targets, groups, temperature)
    assert found.trajectory.item() == pytest.approx(ce, abs=1e-5)
    assert found.certainty.item() == pytest.approx(entropy, abs=1e-5)
    assert found.right == pytest.approx((logits.argmax(-1) == targets).double().mean().item(), abs=1e-6)
    sure = (logits.argmax(-1) == targets) & (logits.softmax(-1).max(-1).values >= 0.9)
    assert found.sure == pytest.approx(sure.double().mean().item(), abs=1e-6)


def test_weights_make_weighted_means() -> None:
    """A row of weight 2 counts as two rows."""
    logits, targets, _, groups = case(12)
    twice = torch.arange(12) % 3 == 0
    found = certainty_forcing(logits, targets, 1.0 + twice, groups)
    more_logits, more_targets, more_groups = (torch.cat((t, t[twice])) for t in (logits, targets, groups))
    ce, entropy = published(more_logits, more_targets, more_groups, 0.5)
    assert found.trajectory.item() == pytest.approx(ce, abs=1e-5)
    assert found.certainty.item() == pytest.approx(entropy, abs=1e-5)


def test_gradients_are_those_of_finite_differences() -> None:
    logits, targets, weights, groups = case(6, 5)
    logits = logits.double().requires_grad_()

    def terms(x: Tensor) -> tuple[Tensor, Tensor]:
        found = certainty_forcing(x, targets, weights.double(), groups, chunk=4)
        return found.trajectory, found.certainty

    assert torch.autograd.gradcheck(terms, (logits,))


def test_only_what_is_right_is_made_sure() -> None:
    logits, targets, weights, groups = case()
    logits.requires_grad_()
    certainty_forcing(logits, targets, weights, groups).certainty.backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    touched = logits.grad.abs().sum(-1) > 0
    assert touched.tolist() == (logits.argmax(-1) == targets).tolist()
    stepped = (logits - 0.1 * logits.grad).detach()
    right = touched.nonzero()[:, 0]
    assert (stepped.softmax(-1)[right, targets[right]] >= logits.softmax(-1)[right, targets[right]] - 1e-7).all()


def test_hidden_rows_with_a_head_give_the_same_values_and_gradients() -> None:
    _, targets, weights, groups = case()
    draw = torch.Generator().manual_seed(3)
    results = []
    for form in ("logits", "hidden"):
        draw.manual_seed(3)
        hidden = torch.randn(40, 6, generator=draw, dtype=torch.float64, requires_grad=True)
        head = torch.randn(13, 6, generator=draw, dtype=torch.float64, requires_grad=True)
        student = hidden @ head.T if form == "logits" else Hidden.linear(hidden, head)
        found = certainty_forcing(student, targets, weights.double(), groups, chunk=9)
        (found.trajectory + 2 * found.certainty).backward()  # type: ignore[no-untyped-call]
        results.append((found.trajectory, found.certainty, hidden.grad, head.grad))
    for one, other in zip(*results, strict=True):
        assert one is not None
        assert other is not None
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_no_row_right_and_no_row_at_all_are_zero_with_a_gradient() -> None:
    logits = torch.tensor([[3.0, 0.0], [3.0, 0.0]], requires_grad=True)
    found = certainty_forcing(logits, torch.tensor([1, 1]), torch.ones(2), torch.zeros(2, dtype=torch.long))
    assert found.certainty.item() == 0
    (found.trajectory + found.certainty).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    nothing = torch.zeros(0, 2, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    found = certainty_forcing(nothing, none, torch.zeros(0), none)
    assert (found.trajectory.item(), found.certainty.item(), found.right) == (0, 0, 0)
    (found.trajectory + found.certainty).backward()  # type: ignore[no-untyped-call]
    weightless = certainty_forcing(logits, torch.tensor([0, 1]), torch.tensor([1.0, 0.0]), torch.tensor([0, 1]))
    assert weightless.trajectory.item() == pytest.approx(math.log1p(math.exp(-3)), abs=1e-6)


# ---- states ----------------------------------------------------------------------------------------------------------

MASK, EOS, PAD = 95, 94, 0
ONE = Trajectory("a", "t", (5, 6, 7), tuple(range(10, 52)) + (EOS,), tuple(range(64))[::-1], 64)  # noqa: RUF005
SHORT = Trajectory("b", "t", (5,), (8, 9, EOS), (), 0)


def states(block: int = 0, **settings: object) -> States:
    return States(MASK, EOS, PAD, block, TrajectorySettings(**settings))  # type: ignore[arg-type]


def lines_of(asked: Asked, ones: list[Trajectory]) -> list[tuple[list[int], dict[int, int], list[int]]]:
    """Of each line: the canvas as shown, what is asked of it (position -> target), the group of each."""
    rows = asked.rows
    ids = rows.ids.view(rows.batch, rows.length).tolist()
    found = []
    for at, line in enumerate(ids):
        prompt = len(ones[at % len(ones)].prompt)
        here = (rows.wanted // rows.length == at).nonzero()[:, 0]
        places = (rows.wanted[here] % rows.length - prompt).tolist()
        targets = dict(zip(places, rows.targets[here].tolist(), strict=True))
        found.append((line[prompt:], targets, asked.groups[here].tolist()))
    return found


@pytest.mark.parametrize("order", ["teacher", "random"])
@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_a_window_is_asked_about_between_what_is_shown_and_what_is_masked(order: str, progress: float) -> None:
    made = states(order=order, windows=(16, 24, 32), canvases=(0,), masked=(0.2, 0.5, 0.8))
    draw = torch.Generator().manual_seed(0)
    clean = [*ONE.answer, *[EOS] * (64 - len(ONE.answer))]
    begins = set()
    for _ in range(60):
        found = lines_of(made.ask([ONE], [0], progress, draw), [ONE])
        if len(found) == 1:  # all or nothing of the window was masked, and nothing is left for the other
            continue
        (shown, asked, group), (other_shown, other, other_group) = found
        window = window_size((16, 24, 32), progress)
        places = sorted({*asked, *other})
        begin = places[0]
        begins.add(begin)
        assert places == list(range(begin, min(begin + window, 64)))  # each of its tokens is asked once
        assert not asked.keys() & other.keys()
        assert begin % window == 0
        for line, wanted in ((shown, asked), (other_shown, other)):
            assert line[:begin] == clean[:begin]
            assert all(token == MASK for token in line[begin + window :])
            assert [p for p in places if line[p] == MASK] == sorted(wanted)
            assert all(clean[p] == token for p, token in wanted.items())
        assert set(group) <= {0}
        assert set(other_group) <= {1}
    assert begins == set(range(0, len(ONE.answer), window_size((16, 24, 32), progress)))  # windows of the answer alone


def test_the_masked_share_rises_and_follows_the_teacher() -> None:
    """d3LLM: the share is uniform in [begin + progress (end - begin), high]; what is shown was decided first."""
    made = states(windows=(32,), canvases=(0,), masked=(0.0, 0.8, 0.8), complement=False)
    for progress in (0.0, 0.5, 1.0):
        draw = torch.Generator().manual_seed(4)
        counts = []
        for _ in range(400):
            ((_, asked, _),) = lines_of(made.ask([ONE], [0], progress, draw), [ONE])
            begin = min(asked) // 32 * 32
            assert sorted(asked) == list(range(begin, begin + len(asked)))  # the teacher went from right to left
            counts.append(len(asked))
        low, high = (32 - int((1 - s) * 32) for s in (0.8 * progress, 0.8))
        assert min(counts) == pytest.approx(low, abs=1)
        assert max(counts) == high
        assert sum(counts) / len(counts) == pytest.approx((low + high) / 2, abs=1.2)


def test_whole_windows_come_with_their_share() -> None:
    made = states(windows=(32,), canvases=(0,), masked=(0.0, 0.0, 0.5), whole=0.25, complement=False)
    draw = torch.Generator().manual_seed(4)
    whole = [len(lines_of(made.ask([ONE], [0], 0.3, draw), [ONE])[0][1]) == 32 for _ in range(600)]
    assert sum(whole) / len(whole) == pytest.approx(0.25, abs=0.06)


def test_canvases_take_turns_and_padding_weighs_less() -> None:
    made = states(windows=(32,), canvases=(-1, 0, 1), masked=(1.0, 1.0, 1.0), complement=False, tail=0.25)
    assert [made.size(SHORT, turn) for turn in range(4)] == [8, 32, 64, 8]
    assert [made.size(ONE, turn) for turn in range(3)] == [48, 64, 96]
    assert made.cost(SHORT, 1) == 33
    asked = made.ask([SHORT], [1], 0.0, torch.Generator().manual_seed(0))
    assert asked.rows.targets.tolist() == [8, 9, *[EOS] * 30]
    assert asked.rows.weights.tolist() == [1.0] * 3 + [0.25] * 29


def test_a_batch_keeps_its_examples_apart() -> None:
    made = states(windows=(32,), canvases=(0,), masked=(1.0, 1.0, 1.0))
    asked = made.ask([ONE, SHORT], [0, 0], 0.0, torch.Generator().manual_seed(0))
    rows = asked.rows
    assert rows.batch == 2  # the complements would ask nothing
    assert rows.mask is not None
    assert rows.mask[:, 0, 0].sum(-1).tolist() == [67, 33]
    assert asked.groups.tolist() == [0] * len(rows.wanted)


def test_a_batch_of_which_nothing_is_masked_asks_nothing_and_still_runs() -> None:
    made = states(windows=(32,), canvases=(0,), masked=(0.0, 0.0, 1e-9), order="random", complement=False)
    asked = made.ask([ONE, SHORT], [0, 0], 0.0, torch.Generator().manual_seed(0))
    assert asked.rows.batch == 1
    assert len(asked.rows.wanted) == len(asked.groups) == 0


def test_rows_of_masked_diffusion_are_what_the_model_says_of_the_shown_canvas() -> None:
    net = models.tiny("llada", seed=1)
    assert net.info.mask_id is not None
    made = states(windows=(32,), canvases=(-1,), masked=(0.5, 0.5, 0.5), complement=False)
    made = replace(made, mask=net.info.mask_id)
    asked = made.ask([SHORT, replace(SHORT, prompt=(11, 12, 13))], [0, 0], 0.0, torch.Generator().manual_seed(5))
    rows = asked.rows
    with torch.no_grad():
        logp = net.head(net(rows.ids, rows.positions, short_attention(rows))[rows.wanted]).log_softmax(-1)
    got = -logp.gather(1, rows.targets[:, None])[:, 0]
    for i, place in enumerate(rows.wanted.tolist()):
        line, row = divmod(place, rows.length)
        used = 9 if line % 2 == 0 else 11
        ids = rows.ids.view(rows.batch, -1)[line, :used].tolist()
        want = plain_nll(net, ids, [list(range(used))] * used, row, int(rows.targets[i]), list(range(used)))
        assert got[i].item() == pytest.approx(want, abs=1e-5)


def test_block_diffusion_asks_of_every_block_what_the_model_says_of_it_alone() -> None:
    net = models.tiny("sdar", seed=1, block=4)
    one = Trajectory("a", "t", (5, 6, 7, 11, 12), tuple(range(20, 28)) + (EOS,), tuple(range(9)), 9)  # noqa: RUF005
    made = states_of(net.info, TrajectorySettings(masked=(0.5, 0.5, 0.5)))
    made = replace(made, eos=EOS)
    asked = made.ask([one], [0], 0.0, torch.Generator().manual_seed(5))
    rows, mask = asked.rows, net.info.mask_id
    assert mask is not None
    size = made.size(one, 0)
    assert size == 11  # positions 5 to 15
    assert made.cost(one, 0) == 12 + 12
    clean = [*one.prompt, *one.answer, EOS, EOS]
    asked_of: list[set[int]] = [set(), set()]
    with torch.no_grad():
        logp = net.head(net(rows.ids, rows.positions, short_attention(rows))[rows.wanted]).log_softmax(-1)
    for i, place in enumerate(rows.wanted.tolist()):
        line, at = place // rows.length, int(rows.positions[place])
        asked_of[line].add(at)
        assert int(rows.targets[i]) == clean[at]
        begin = at // 4 * 4
        noisy = {
            int(rows.positions[line * rows.length + r]): int(rows.ids[line * rows.length + r]) for r in range(12, 24)
        }
        ids = [*clean[:begin], *(noisy[p] for p in range(begin, begin + 4))]
        visible = [list(range((p // 4 + 1) * 4)) for p in range(len(ids))]
        want = plain_nll(net, ids, visible, at, clean[at], list(range(len(ids))))
        assert -logp[i, rows.targets[i]].item() == pytest.approx(want, abs=1e-5)
        assert noisy[at] == mask
    assert asked_of[0] | asked_of[1] == set(range(5, 16))  # the prompt's tokens in the first block stay
    assert not asked_of[0] & asked_of[1]
    for begin in (8, 12):  # half of each whole block, that which the teacher decided last
        assert {at for at in asked_of[0] if begin <= at < begin + 4} == {begin + 2, begin + 3}


@pytest.mark.parametrize(
    ("family", "settings", "says"),
    [("llama", {}, "autoregressive"), ("dream", {}, "row before"), ("sdar", {"windows": (16,)}, "windows")],
)
def test_a_model_that_cannot_learn_this_is_refused(family: str, settings: dict[str, object], says: str) -> None:
    net = models.tiny(family, seed=1, block=4 if family == "sdar" else None)
    with pytest.raises(UnsupportedError, match=says):
        states_of(net.info, TrajectorySettings(**settings))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"masked": (0.5, 0.3, 0.8)}, "must rise"),
        ({"masked": (0.0, 0.0, 0.0)}, "nothing would be masked"),
        ({"masked": (0.0, 0.5, 1.5)}, "less than or equal to 1"),
        ({"windows": (32, 16)}, "must not shrink"),
        ({"windows": (0,)}, "greater than or equal to 1"),
        ({"canvases": ()}, "at least one size"),
        ({"canvases": (-2,)}, "greater than or equal to -1"),
        ({"order": "left"}, "teacher"),
        ({"every": -1}, "greater than or equal to 0"),
        ({"ever": 1}, "not permitted"),
    ],
)
def test_settings_that_mean_nothing_are_refused(given: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        TrajectorySettings(**given)  # type: ignore[arg-type]
