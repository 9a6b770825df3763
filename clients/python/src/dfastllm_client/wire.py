"""The typed events of a canvas.

Made by `python -m clients.generate_types` from the server's openapi.json; do not edit.
"""

from __future__ import annotations

from typing import Literal, TypedDict

__all__ = [
    "BlockDoneEvent",
    "CanvasEvent",
    "CanvasToken",
    "CommitEvent",
    "ProvisionalEvent",
    "ReviseEvent",
    "RevisedToken",
    "StatsEvent",
]


class CanvasToken(TypedDict):
    """Positions count from the first new token."""

    position: int
    token_id: int
    text: str


class RevisedToken(TypedDict):
    """null: the position is masked again."""

    position: int
    token_id: int | None
    text: str | None


class BlockDoneEvent(TypedDict):
    """A block became final."""

    type: Literal["block_done"]


class CommitEvent(TypedDict):
    """Masked positions that got their tokens."""

    type: Literal["commit"]
    tokens: list[CanvasToken]


class ProvisionalEvent(TypedDict):
    """The best guess of masked positions."""

    type: Literal["provisional"]
    tokens: list[CanvasToken]


class ReviseEvent(TypedDict):
    """Committed positions that changed."""

    type: Literal["revise"]
    tokens: list[RevisedToken]


class StatsEvent(TypedDict):
    """step: from 1. length: tokens of the canvas. masked: of them still masked."""

    type: Literal["stats"]
    step: int
    length: int
    masked: int


CanvasEvent = BlockDoneEvent | CommitEvent | ProvisionalEvent | ReviseEvent | StatsEvent
