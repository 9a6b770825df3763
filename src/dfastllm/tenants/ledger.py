"""The ledger of usage: what each request took, recorded before it is sent."""

from __future__ import annotations

from typing import Literal

from dfastllm.tenants.identity import Identity
from dfastllm.tenants.store import Store

__all__ = ["Entry", "Ledger", "Status"]

Status = Literal["ok", "cancelled", "failed"]


class Entry:
    """One request in the ledger."""

    async def add(self, tokens: int) -> None:
        """Returns once so many more completion tokens are recorded (call it before they are sent). Never raises for a
        database that is down."""
        raise NotImplementedError

    def close(self, status: Status) -> None:
        """How it ended. Written soon, waited for by nobody; a second call does nothing."""
        raise NotImplementedError


class Ledger:
    """One a server. Starts its threads."""

    def __init__(self, store: Store) -> None:
        raise NotImplementedError

    def open(self, request_id: str, identity: Identity, model: str, adapter: str, prompt_tokens: int) -> Entry:
        """A new entry, written with its first tokens or its end; does not wait."""
        raise NotImplementedError

    def close(self) -> None:
        """Writes what is left and ends the threads (at most some seconds)."""
        raise NotImplementedError
