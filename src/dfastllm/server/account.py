"""What one call takes of its tenant: a place within the limits, a row of the ledger, counts in the metrics.

Tokens are recorded before they are sent: delivered <= recorded <= generated, whenever the process is killed.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Literal

from dfastllm.core import StepEvent
from dfastllm.errors import RateLimitError
from dfastllm.tenants import Identity

if TYPE_CHECKING:
    from dfastllm.server.serving import Serving

__all__ = ["Account", "Status"]

Status = Literal["ok", "cancelled", "failed"]


class Account:
    """Opened before a call reaches the engine, closed when it has ended in whatever way.

    id: of the response. model, adapter: "" for none. prompt: tokens of its prompts, each once; most: tokens that all of
    it may take, prompts included. Raises RateLimitError and ValidationError of the tenant's limits.
    """

    def __init__(
        self, serving: Serving, identity: Identity, *, id: str, model: str, adapter: str, prompt: int, most: int
    ) -> None:
        self.prompt = prompt
        self.tokens = 0  # generated
        self._due = 0  # of these, not yet recorded
        self._tenant = identity.tenant
        self._model = model
        self._metrics = serving.metrics.tenants if serving.ledger is not None else None
        try:
            self._lease = serving.limits.take(identity.tenant, most)
        except RateLimitError:
            if self._metrics is not None:
                self._metrics.refused(identity.tenant.name)
            raise
        self._began = time.monotonic()
        self._first = True
        self._entry = None
        if serving.ledger is not None:
            self._entry = serving.ledger.open(id, identity, model, adapter, prompt)
        if self._metrics is not None:
            self._metrics.begun(identity.tenant.name)

    @property
    def kept(self) -> bool:
        """Whether there is a ledger."""
        return self._entry is not None

    def saw(self, event: StepEvent) -> None:
        """An event of the call came from the engine."""
        self.tokens += len(event.token_ids)
        self._due += len(event.token_ids)
        if event.token_ids and self._first:
            self._first = False
            if self._metrics is not None:
                self._metrics.first_token(self._tenant.name, time.monotonic() - self._began)

    async def record(self) -> None:
        """Returns once everything that was seen is recorded."""
        if self._entry is not None and self._due:
            due, self._due = self._due, 0
            await self._entry.add(due)

    def close(self, status: Status) -> None:
        """What was seen and not recorded counts too: nobody waits for that, since nobody gets it."""
        self._lease.end(self.prompt + self.tokens)
        if self._entry is not None:
            self._entry.tokens += self._due
            self._entry.close(status)
        if self._metrics is not None:
            self._metrics.ended(self._tenant.name, self._model, status, self.prompt, self.tokens)
