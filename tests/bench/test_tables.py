"""What a bench prints: every heading and value whole, in 80 columns."""

from __future__ import annotations

from typing import Any

import pytest

from dfastllm.bench.__main__ import WIDTH, _table
from dfastllm.bench.lora import Row
from dfastllm.metrics.records import spread

SOME = spread([556.610, 544.051, 564.419])


def lora_rows() -> list[dict[str, Any]]:
    cost = spread([0.123831, 0.098538, 0.149736])
    return [
        vars(Row(name, n, SOME, cost, 496_071_680, 281_542_656, 1_122_975_744, 10.9279))
        for name in ("q,k,v,o", "all linears")
        for n in (1, 8, 64)
    ]


TABLES: dict[str, list[dict[str, Any]]] = {
    "lora": lora_rows(),
    "narrow": [{"name": "a", "value": 1_234_567}, {"name": "b", "value": 2}],
    "many": [{f"a_long_name_of_a_column_{i}": SOME for i in range(12)}] * 7,
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_fits(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = TABLES[name]
    _table("a title that is a sentence of its own: median (low–high)", rows)
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= WIDTH
    for heading in rows[0]:
        assert heading in said
    assert "…" not in said
    if name == "lora":
        for shown in ("281,542,656", "556.6 (544.1–564.4)", "10.93", "all linears"):
            assert shown in said
        assert said.count("adapter_bytes") == -(-len(rows) // 2)  # two rows side by side
