"""`python -m tests.decode.canvas.count_equal [CASES]` prints, for every rule, how many of the decisions of so many
random canvases are those of its float64 twin. The figures of docs/decoders.md are from it."""

from __future__ import annotations

import sys
from collections import Counter

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dfastllm.decode.registry import RULES
from tests.decode.canvas.test_rules import beside_its_twin


def count(name: str, cases: int) -> tuple[int, int]:
    """(equal decisions, all decisions)."""
    found: Counter[bool] = Counter()

    @settings(
        max_examples=cases, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(data=st.data())
    def case(data: st.DataObject) -> None:
        found.update(said == twin for said, twin in beside_its_twin(name, data))

    case()
    return found[True], found.total()


if __name__ == "__main__":
    for rule in RULES:
        equal, steps = count(rule, int(sys.argv[1]) if sys.argv[1:] else 500)
        print(f"{rule:18} {equal} of {steps} decisions", flush=True)
