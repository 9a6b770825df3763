"""What rules do where a confidence is exactly the number it is compared with."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dfastllm.decode.canvas.rules import RULES, Field, decide


def field(name: str, confidence: list[float], **options: Any) -> Field:
    """A block of masks at step 0 of as many steps, where every row has been steady for long."""
    size = len(confidence)
    no, row = np.zeros((1, size), dtype=bool), np.asarray([confidence])
    known = {key: option.default for key, option in RULES[name].options.items()} | options
    return Field(
        masked=~no,
        confidence=row,
        entropy=np.zeros_like(row),
        margin=row,
        kept=row,
        held=no,
        differs=no,
        ready=~no,
        keys=np.zeros((1, size), dtype=np.uint64),
        begun=np.zeros(1, dtype=int),
        size=np.full(1, size),
        step=np.zeros(1, dtype=int),
        steps=np.full(1, size),
        options=[known],
        memory=[None],
    )


@pytest.mark.parametrize(
    ("name", "options", "accepted"),
    [
        ("klass", {"threshold": 0.5}, [False, True, False]),  # c > threshold, as published
        ("schedule", {"early_stop_confidence": 0.25}, [True, True, True]),  # every one reaches it: at least
        ("schedule", {"early_stop_confidence": 0.2501}, [False, True, False]),
    ],
)
def test_at_the_limit(name: str, options: dict[str, float], accepted: list[bool]) -> None:
    assert decide(RULES[name], field(name, [0.5, 0.75, 0.25], **options))[0].tolist() == accepted
