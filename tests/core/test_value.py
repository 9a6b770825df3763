"""`value`: equality, hash and repr of a frozen dataclass, slots, and no cost of one."""

from __future__ import annotations

import dataclasses

import pytest

from dfastllm.core import Span, value


@value(frozen=True, slots=True)
class Point:
    x: int
    y: tuple[int, ...] = ()
    note: object = dataclasses.field(default=None, compare=False, repr=False)


@dataclasses.dataclass(frozen=True, slots=True)
class Twin:
    x: int
    y: tuple[int, ...] = ()
    note: object = dataclasses.field(default=None, compare=False, repr=False)


def test_a_value_is_like_a_frozen_dataclass() -> None:
    one, two = Point(3, (4,), note=[]), Point(3, (4,))
    assert one == two != Point(3)
    assert hash(one) == hash(two) == hash(Twin(3, (4,)))
    assert repr(one) == repr(Twin(3, (4,))).replace("Twin", "Point")
    assert dataclasses.replace(one, x=5) == Point(5, (4,))
    assert [f.name for f in dataclasses.fields(Point)] == [f.name for f in dataclasses.fields(Twin)]
    with pytest.raises(AttributeError):
        one.z = 1  # type: ignore[attr-defined]


def test_what_a_policy_notes_in_a_span_is_no_part_of_it() -> None:
    assert Span(0, (1,), "full", "none", plan=object()) == Span(0, (1,), "full", "none")
