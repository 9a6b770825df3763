"""Typed canvas events: what a live display of a denoising step needs, beside the plain deltas."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dfastllm.core import CanvasUpdate
from dfastllm.server.replies import CanvasChunk, CanvasEvent, CanvasToken, RevisedToken
from dfastllm.text.token_text import token_text

if TYPE_CHECKING:
    from dfastllm.text import Tokenizer

__all__ = ["canvas_chunk"]


def canvas_chunk(tokenizer: Tokenizer, index: int, step: int, update: CanvasUpdate) -> CanvasChunk:
    """The `canvas` object of a chunk: the events of step number `step` (from 1) of choice `index`, in order."""

    def cell(position: int, token: int) -> CanvasToken:
        return {"position": position, "token_id": token, "text": token_text(tokenizer, token)}

    def revised(position: int, token: int | None) -> RevisedToken:
        if token is None:
            return {"position": position, "token_id": None, "text": None}
        return {"position": position, "token_id": token, "text": token_text(tokenizer, token)}

    events: list[CanvasEvent] = []
    if update.commit:
        events.append({"type": "commit", "tokens": [cell(*item) for item in sorted(update.commit.items())]})
    if update.revise:
        events.append({"type": "revise", "tokens": [revised(at, update.revise[at]) for at in sorted(update.revise)]})
    if update.provisional:
        events.append({"type": "provisional", "tokens": [cell(*item) for item in sorted(update.provisional.items())]})
    if update.block_done:
        events.append({"type": "block_done"})
    events.append({"type": "stats", "step": step, "length": update.length, "masked": update.masked})
    return {"index": index, "events": events}
