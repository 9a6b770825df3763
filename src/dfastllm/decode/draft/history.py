"""Draft length under rejection sampling: from what became of the request's own drafts, and nothing else.

There a draft decides which tokens come, and so does its length. Times and neighbours differ from run to run; how many
tokens of each draft stood does not. So the rule is fixed: one more than stood, growing by one while all stand; drafts
that fail four times in a row stop for a while, longer each time.
"""

from __future__ import annotations

from dfastllm.core import value

__all__ = ["History", "after", "allowed"]

MISSES = 4  # drafts in a row of which nothing stood
PAUSE, LONGEST_PAUSE = 16, 256  # tokens


@value(frozen=True, slots=True)
class History:
    """length: most tokens of the next draft. misses: drafts in a row of which nothing stood. resume: no draft before
    the text has so many tokens. pause: how long the next pause will be."""

    length: int
    misses: int = 0
    resume: int = 0
    pause: int = PAUSE


def allowed(history: History | None, most: int, tokens: int) -> int:
    """Most tokens of a draft for a text of `tokens`, of `most` that were asked for."""
    if history is None:
        return most
    return min(history.length, most) if tokens >= history.resume else 0


def after(history: History | None, most: int, drafted: int, accepted: int, tokens: int) -> History:
    """The history after a draft, of which `accepted` tokens stood and which left a text of `tokens`."""
    old = history or History(most)
    if accepted == drafted:
        return History(min(most, max(old.length, drafted) + 1))
    if accepted:
        return History(min(most, accepted + 1))
    if old.misses + 1 < MISSES:
        return History(1, old.misses + 1, pause=old.pause)
    return History(1, 0, tokens + old.pause, min(LONGEST_PAUSE, 2 * old.pause))
