"""Time limits of a call, and trying again what was not run."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TypeVar

from .backoff import Backoff
from .errors import ConnectionFailedError, NotReadyError, RateLimitError, TimeoutError

__all__ = ["again", "limited", "within"]

T = TypeVar("T")


def _too_long(seconds: float | None, request_id: str) -> TimeoutError:
    return TimeoutError(f"The call took longer than {seconds} s, and was ended.", request_id=request_id)


async def within(work: Awaitable[T], seconds: float | None, request_id: str) -> T:
    """What `work` gives, which is cancelled after so many seconds. Raises TimeoutError (ours)."""
    try:
        return await asyncio.wait_for(work, seconds)
    except TimeoutError:
        raise  # the server's
    except asyncio.TimeoutError as error:  # another class than the builtin before Python 3.11
        raise _too_long(seconds, request_id) from error


async def limited(parts: AsyncGenerator[T, None], seconds: float | None, request_id: str) -> AsyncGenerator[T, None]:
    """The same parts, all of which must come within so many seconds of the first one's being asked for."""
    end = None if seconds is None else time.monotonic() + seconds
    try:
        while True:
            left = None if end is None else max(0.0, end - time.monotonic())
            try:
                part = await asyncio.wait_for(parts.__anext__(), left)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise  # the server's
            except asyncio.TimeoutError as error:
                raise _too_long(seconds, request_id) from error
            yield part
    finally:
        await parts.aclose()


async def again(
    attempt: Callable[[], Awaitable[T]], backoff: Backoff, seconds: float | None = None, *, connect: bool = True
) -> T:
    """What `attempt` gives, tried again after a wait where nothing was run: it was refused with the time to come back,
    or (connect) it could not be sent. seconds: no wait goes on beyond these; the refusal is raised instead."""
    end = None if seconds is None else time.monotonic() + seconds
    tries = 0
    while True:
        try:
            return await attempt()
        except (ConnectionFailedError, RateLimitError, NotReadyError) as error:
            repeatable = connect if isinstance(error, ConnectionFailedError) else error.retry_after is not None
            wait = backoff.wait(tries, error.retry_after)
            if not repeatable or wait is None or (end is not None and time.monotonic() + wait >= end):
                raise
        tries += 1
        await asyncio.sleep(wait)
