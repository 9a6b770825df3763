"""A step's words: what is refused, by the native kernels and by the plain check alike, and that nothing gets lost."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfastllm.core import Span
from dfastllm.engine.batch import pack
from dfastllm.engine.pages import Pages, PageTable
from dfastllm.errors import ValidationError
from dfastllm.kernels import native
from dfastllm.kernels.step import Step

BLOCKS = 8


def some_step() -> Step:
    """Three spans, of which one has shadows and one is not cached."""
    table = PageTable(Pages(BLOCKS, 16))
    table.grow(60)
    return pack(
        [
            (Span(20, (5, 6, 7), "causal", "keep", want=(2,)), table, 20),
            (Span(24, (8, 9), "full", "scratch", want=(0, 2), shadows=((25, 3),)), table, 24),
            (Span(0, (1, 2), "full", "none"), table, 0),
        ]
    )


def checks(step: Step) -> None:
    """Both checks, which must agree: the plain one, and that of the native kernels where they are built."""
    errors = []
    try:
        step.check(BLOCKS, len(step.own_blocks))
    except ValidationError as error:
        errors.append(error)
    if native() is not None:
        try:
            bound = step.native()
            cache = native_caches(len(step.own_blocks))
            native().attention(*attention_arguments(step, *cache, bound))
        except (ValidationError, ValueError) as error:
            errors.append(error)
        assert len(errors) in (0, 2), f"only one of two checks refuses: {errors}"
    if errors:
        raise ValidationError(str(errors[-1]))


def native_caches(own: int) -> tuple[object, object]:
    from dfastllm.kernels.kv import KvCache

    return KvCache(1, BLOCKS, 1, 16).native(), KvCache(1, own, 1, 16).native()


def attention_arguments(step: Step, cache: object, own: object, bound: object) -> tuple[object, ...]:
    q, out = np.zeros((len(step), 16), dtype=np.float32), np.zeros((len(step), 16), dtype=np.float32)
    return q, 1, 1.0, cache, own, bound, out


def test_a_good_step_passes() -> None:
    checks(some_step())


def test_words_are_the_whole_step() -> None:
    step = some_step()
    again = Step(step.words.copy())
    assert all((a == b).all() for a, b in zip(step.arrays().values(), again.arrays().values(), strict=True))
    assert Step.of(step.arrays()).words.tolist() == step.words.tolist()
    assert (len(again), again.block_size, again.own_keys) == (8, 16, 32)


@pytest.mark.parametrize("cut", [1, 5, 16, 100])
def test_a_cut_step_is_named(cut: int) -> None:
    words = some_step().words
    with pytest.raises(ValidationError, match=r"cut or too long|another version"):
        Step(words[:-cut].copy())
    with pytest.raises(ValidationError, match="cut or too long"):
        Step(np.concatenate([words, words[:cut]]))


def test_another_version_is_named() -> None:
    words = some_step().words.copy()
    words[0] += 1
    with pytest.raises(ValidationError, match="another version"):
        Step(words)
    with pytest.raises(ValidationError, match="contiguous int32"):
        Step(some_step().words.astype(np.int64))  # type: ignore[arg-type]


CHANGES: list[tuple[str, Callable[[Step], None]]] = [
    ("ids of the step", lambda s: s.ids.__setitem__(0, -1)),
    ("positions of the step", lambda s: s.positions.__setitem__(1, -5)),
    ("slot of the step", lambda s: s.slot.__setitem__(0, BLOCKS * 16)),
    ("slot of the step", lambda s: s.slot.__setitem__(0, -2)),
    ("own_slot of the step", lambda s: s.own_slot.__setitem__(4, 32)),
    ("adapter of the step", lambda s: s.adapter.__setitem__(4, -1)),
    ("want of the step", lambda s: s.want.__setitem__(0, 8)),
    ("blocks of the step", lambda s: s.blocks.__setitem__(1, BLOCKS)),
    ("own_blocks of the step", lambda s: s.own_blocks.__setitem__(0, 2)),
    ("cached keys", lambda s: s.cached_limit.__setitem__(0, 24)),
    ("cached keys", lambda s: s.cached_limit.__setitem__(0, -1)),
    ("own keys", lambda s: s.own_limit.__setitem__(7, 3)),
    ("in order within", lambda s: s.spans[0].__setitem__(1, 9)),
    ("in order within", lambda s: s.spans[1].__setitem__(0, 2)),
    ("not the blocks", lambda s: s.spans[1].__setitem__(4, 3)),
    ("not the blocks", lambda s: s.spans[2].__setitem__(3, 17)),
    ("not the blocks", lambda s: s.spans[2].__setitem__(5, -1)),
    ("mask of span 1", lambda s: s.spans[1].__setitem__(7, 1000)),
]


@pytest.mark.parametrize(("message", "change"), CHANGES)
def test_what_does_not_fit_is_named(message: str, change: Callable[[Step], None]) -> None:
    step = Step(some_step().words.copy())
    change(step)
    with pytest.raises(ValidationError, match=message):
        checks(step)


@pytest.mark.parametrize("span", [0, 1, 2])
def test_a_span_may_be_empty(span: int) -> None:
    step = Step(some_step().words.copy())
    step.spans[span][1] = step.spans[span][0]
    checks(step)


@given(st.integers(0, 200), st.sampled_from([-(1 << 31), -2, -1, 0, 1, 7, 300, (1 << 31) - 1]))
@settings(max_examples=300, deadline=None)
def test_no_word_can_crash_it(at: int, value: int) -> None:
    """Any word changed: the step is refused by both checks, or runs."""
    words = some_step().words.copy()
    words[16 + at % (len(words) - 16)] = value  # the header is refused before: its counts, and blocks of another size
    try:
        checks(Step(words))
    except ValidationError:
        return
