"""Typed canvas events: what a live display of a denoising step needs, beside the plain deltas.

Positions count from the first new token. `commit` and `provisional` list {position, token_id, text}; `revise` too, with
null for a position that was masked again; `block_done` says that a block became final; `stats` counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dfastllm.core import CanvasUpdate
from dfastllm.server.tokens import token_text

if TYPE_CHECKING:
    from dfastllm.text import Tokenizer

__all__ = ["canvas_chunk"]


def canvas_chunk(tokenizer: Tokenizer, index: int, step: int, update: CanvasUpdate) -> dict[str, Any]:
    """The `canvas` object of a chunk: the events of step number `step` (from 1) of choice `index`, in order."""

    def cells(tokens: Mapping[int, int | None]) -> list[dict[str, Any]]:
        return [
            {"position": at, "token_id": token, "text": None if token is None else token_text(tokenizer, token)}
            for at, token in sorted(tokens.items())
        ]

    named: tuple[tuple[str, Mapping[int, int | None]], ...] = (
        ("commit", dict(update.commit)),
        ("revise", update.revise),
        ("provisional", dict(update.provisional)),
    )
    events: list[dict[str, Any]] = [{"type": name, "tokens": cells(tokens)} for name, tokens in named if tokens]
    if update.block_done:
        events.append({"type": "block_done"})
    events.append({"type": "stats", "step": step, "length": update.length, "masked": update.masked})
    return {"index": index, "events": events}
