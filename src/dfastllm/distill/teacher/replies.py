"""What a server's refusal means: worth another attempt, or an error with a name."""

from __future__ import annotations

import json
from typing import Any

from dfastllm.errors import AuthenticationError, DFastLLMError, ModelNotFoundError, RateLimitError, ValidationError

__all__ = ["Retry", "refusal", "retry_of"]

PASSING = frozenset({408, 409, 425, 429})  # and 5xx
USED_UP = frozenset({"insufficient_quota", "billing_hard_limit_reached"})  # OpenAI's 429 that no wait helps
SHOWN = 300  # characters of a server's own words


class Retry(Exception):
    """An attempt failed in passing. reason: a word for the count. after: seconds the server asked for. paid: the call
    may have been billed."""

    def __init__(self, reason: str, message: str, *, after: float | None = None, paid: bool = False) -> None:
        super().__init__(message)
        self.reason, self.message, self.after, self.paid = reason, message, after, paid


def retry_of(status: int, text: str, after: float | None) -> Retry | None:
    """The attempt's failure, None where another attempt would fail too. Raises RateLimitError for a quota that is used
    up: no attempt with this key will be answered."""
    if status not in PASSING and not 500 <= status < 600:
        return None
    words, code = _words(text)
    if status == 429 and code in USED_UP:
        raise RateLimitError(
            f"The teacher's server says that the quota is used up ({code}): {words}",
            retry_after=after or 1.0,
            hint="All answers so far are kept; the same command goes on when there is quota again.",
        )
    return Retry(f"http_{status}", words, after=after)


def refusal(status: int, text: str, base_url: str, model: str) -> DFastLLMError:
    """The error of a status that no further attempt will change."""
    words, _ = _words(text)
    where = f"The teacher at {base_url} answered {status}"
    if status in (401, 403):
        return AuthenticationError(
            f"{where}: {words}",
            param="teacher.api_key_env",
            hint="Name the environment variable that holds the server's key, and see that the key may use this model.",
        )
    if status == 404:
        return ModelNotFoundError(
            f"{where} for model {model!r}: {words}",
            param="teacher.model",
            hint="See that base_url ends with the API's root (most often /v1), and which names GET /models lists.",
        )
    if 300 <= status < 400:
        return ValidationError(
            f"{where}, a redirect, which is not followed: the key would go to another server.",
            param="teacher.base_url",
            hint="Give the address it leads to.",
        )
    return ValidationError(f"{where}: {words}", param="teacher")


def _words(text: str) -> tuple[str, str]:
    """A server's own words and its code: OpenAI's error object, FastAPI's detail, or the beginning of what it sent."""
    try:
        data: Any = json.loads(text)
    except (ValueError, RecursionError):
        data = None
    if isinstance(data, dict):
        found = data.get("error", data.get("detail", data.get("message", data)))
        code = str(found.get("code") or found.get("type") or "") if isinstance(found, dict) else ""
        if isinstance(found, dict) and "message" in found:
            found = found["message"]
        return (found if isinstance(found, str) else json.dumps(found))[:SHOWN], code
    return " ".join(text.split())[:SHOWN] or "(no words)", ""
