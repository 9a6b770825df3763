"""Fair shares of the engine among tenants: who has had how much, who is next, who waits. Numbers only, pure: no
sequence, no page, no clock.

Two things are shared. *Rows* of the forward passes, over time: each tenant has a virtual time, which the rows that ran
for it advance, divided by its weight; the tenant whose time is least has had least (start-time fair queueing, Goyal,
Vin and Cheng 1996; with tokens as the measure, Sheng et al. 2024, "Fairness in Serving Large Language Models").
*Places and pages*, at a moment: a tenant's part is the larger of its parts of the places and of the pages, divided by
its weight, and the tenant whose part is least gets the next place (dominant resource fairness, Ghodsi et al. 2011).

What a tenant did not ask for is not saved up for ever: it lags at most `burst` rows (of the tenant that is ahead)
behind the foremost. So a tenant that returns, or is new, is ahead of a flood by that much and no more: its first tokens
come at once, and after them it has its share.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

__all__ = ["Fairness"]

HASTE = 0.5  # part of `burst`: whoever lags more, and waits for a first token, has the steps to itself
FORGET = 1024  # accounts of tenants without requests that are kept


@dataclass(slots=True)
class _Account:
    """What is known of one tenant.

    time      virtual: rows divided by the weight. Below the floor it counts as the floor.
    requests  that wait or run. places, pages: those that its running ones hold.
    ran       the step in which it last ran, -1 for none.
    """

    weight: float
    time: float
    requests: int = 0
    places: int = 0
    pages: int = 0
    ran: int = -1


class Fairness:
    """The accounts of one engine. burst: rows; places, pages: how many there are."""

    def __init__(self, burst: int, places: int, pages: int) -> None:
        self.burst = burst
        self.places = places
        self.pages = pages
        self._accounts: dict[str, _Account] = {}
        self._floor = 0.0
        self._active = 0  # tenants with requests
        self._weight = 0.0  # of those together

    @property
    def alone(self) -> bool:
        """Whether at most one tenant has requests: then there is nothing to share, and no order but the requests'."""
        return self._active <= 1

    @property
    def several(self) -> bool:
        """Whether more than one tenant has been here lately, with requests now or not."""
        return len(self._accounts) > 1

    def join(self, tenant: str, weight: float) -> None:
        """A request of the tenant begins to wait. Its weight holds from now on for all that it has here."""
        account = self._account(tenant, weight)
        if account.requests:
            self._weight -= account.weight
        else:
            self._active += 1
        account.time = max(account.time, self._floor)
        account.weight = weight
        account.requests += 1
        self._weight += weight

    def leave(self, tenant: str) -> None:
        """A request of the tenant is gone."""
        account = self._accounts[tenant]
        account.requests -= 1
        if not account.requests:
            self._active -= 1
            self._weight = self._weight - account.weight if self._active else 0.0  # no rounding is left over

    def hold(self, held: Iterable[tuple[str, int]]) -> None:
        """What is held now: the tenant of each running request, and its pages."""
        for account in self._accounts.values():
            account.places = account.pages = 0
        for tenant, pages in held:
            self.took(tenant, pages)

    def took(self, tenant: str, pages: int) -> None:
        """One more request of the tenant runs, which holds so many pages."""
        account = self._accounts[tenant]
        account.places += 1
        account.pages += pages

    def charge(self, tenant: str, weight: float, rows: int, step: int = -1) -> None:
        """So many rows ran for the tenant, or because of it; step: in which its own ran."""
        account = self._account(tenant, weight)
        account.ran = max(account.ran, step)
        account.time = max(account.time, self._floor) + rows / account.weight
        self._floor = max(self._floor, account.time - self.burst / account.weight)

    def time(self, tenant: str) -> float:
        """Its virtual time; that of a tenant without an account is the least there is."""
        account = self._accounts.get(tenant)
        return self._floor if account is None else max(account.time, self._floor)

    def ran(self, tenant: str) -> int:
        """The step in which it last ran."""
        return self._accounts[tenant].ran

    def part(self, tenant: str) -> float:
        """The larger of its parts of places and pages, divided by its weight."""
        account = self._accounts[tenant]
        return self._held(account) / account.weight

    def turn(self, tenant: str) -> tuple[float, float]:
        """Least first: in this order tenants that wait get places."""
        return self.part(tenant), self.time(tenant)

    def share(self, tenant: str) -> float:
        """The part of places and pages that is its own while those who are here now are here."""
        account = self._accounts[tenant]
        return account.weight / self._weight if account.requests else 0.0

    def may_displace(self, tenant: str, places: int, pages: int) -> bool:
        """Whether the tenant is within its share even with so many more: then whoever is above its own gives way. Who
        had to give way comes back by this rule only when it is within its share, so no two displace each other in turn.
        A tenant without requests is."""
        account = self._accounts.get(tenant)
        if account is None or not account.requests:
            return True
        return self._held(account, places, pages) <= self.share(tenant)

    def above(self, tenants: Iterable[str]) -> str | None:
        """Of these the one most above its share, None when none is."""
        over = {t: self.part(t) for t in tenants if self._held(self._accounts[t]) > self.share(t)}
        return max(over, key=lambda t: (over[t], t)) if over else None

    def before(self, tenant: str, other: str) -> bool:
        """Whether `other` stands back while `tenant` waits for a first token: it had so much more that it stays ahead
        of the tenant even after a burst of rows that is not small. False for a tenant and itself."""
        account = self._accounts.get(other)
        lag = self.time(other) - self.time(tenant)
        return account is not None and lag * account.weight > HASTE * self.burst

    def standing_back(self, times: Mapping[str, float], hasty: Collection[str]) -> set[str]:
        """Of all these tenants those that stand back (`before`) for any that waits for a first token. times: `time` of
        each; hasty: those that wait."""
        if not hasty:
            return set()
        least, limit = min([times[tenant] for tenant in hasty]), HASTE * self.burst
        return {other for other, time in times.items() if (time - least) * self._accounts[other].weight > limit}

    def _held(self, account: _Account, places: int = 0, pages: int = 0) -> float:
        return max((account.places + places) / self.places, (account.pages + pages) / self.pages)

    def _account(self, tenant: str, weight: float) -> _Account:
        account = self._accounts.get(tenant)
        if account is None:
            self._forget()
            account = self._accounts[tenant] = _Account(weight, self._floor)
        return account

    def _forget(self) -> None:
        """Once there are many accounts that nobody uses, drop half of them: those that say least, with the earliest
        times. Their tenants are new when they return."""
        idle = len(self._accounts) - self._active
        if idle < max(self._active, FORGET):
            return
        unused = [(account.time, name) for name, account in self._accounts.items() if not account.requests]
        for _, name in sorted(unused)[: idle // 2]:
            del self._accounts[name]
