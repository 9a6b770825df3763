"""The page about decoders says what the tables say."""

from __future__ import annotations

from pathlib import Path

from dfastllm.decode.__main__ import reference
from dfastllm.decode.registry import CACHES, RULES


def test_the_page_is_current() -> None:
    page = Path(__file__).parents[2] / "docs" / "decoders.md"
    assert page.read_text() == reference(), "run: python -m dfastllm.decode > docs/decoders.md"
    for name in (*RULES, *CACHES):
        assert f"### `{name}`" in reference()
    for name in RULES:
        assert f"| `{name}` | " in reference()
