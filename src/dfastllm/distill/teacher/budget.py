"""What teacher calls may cost: reserved before a call, settled from the usage that the server tells.

A call whose outcome is unknown (no answer in time, a connection that broke, an answer that cannot be read) may have
been billed, so its reservation stays spent: the bound holds whatever the server did.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from dfastllm.errors import BudgetError

__all__ = ["Budget", "Prices", "Reservation"]


@dataclass(frozen=True)
class Prices:
    """Of a million tokens, in any currency."""

    prompt: float = 0.0
    completion: float = 0.0

    def of(self, prompt: int, completion: int) -> float:
        return (prompt * self.prompt + completion * self.completion) / 1e6


@dataclass
class Reservation:
    """Tokens that one call may use at most, as far as they can be told before it."""

    prompt: int
    completion: int
    open: bool = True


class Budget:
    """tokens, price: bounds, None: none. prompt, completion: tokens spent so far, those of earlier runs into the same
    file included. unsettled: of those, tokens of calls whose outcome is unknown. Used by one event loop."""

    def __init__(
        self,
        tokens: int | None = None,
        price: float | None = None,
        prices: Prices = Prices(),
        *,
        prompt: int = 0,
        completion: int = 0,
    ) -> None:
        self.tokens, self.price, self.prices = tokens, price, prices
        self.prompt, self.completion, self.unsettled = prompt, completion, 0
        self._open: list[Reservation] = []
        self._closed = asyncio.Event()

    @property
    def spent(self) -> float:
        """In the prices' currency."""
        return self.prices.of(self.prompt, self.completion)

    def fits(self, prompt: int, completion: int) -> bool:
        """Whether a call of so many tokens fits beside what is spent and what is reserved."""
        prompt += self.prompt + sum(held.prompt for held in self._open)
        completion += self.completion + sum(held.completion for held in self._open)
        if self.tokens is not None and prompt + completion > self.tokens:
            return False
        return self.price is None or self.prices.of(prompt, completion) <= self.price * (1 + 1e-12)

    async def reserve(self, prompt: int, completion: int) -> Reservation:
        """Hold so many tokens for a call. Where they do not fit, wait for the calls under way, which may use less than
        they hold. Raises BudgetError when they do not fit and nothing is under way."""
        while not self.fits(prompt, completion):
            if not self._open:
                raise self._spent(prompt, completion)
            self._closed.clear()
            await self._closed.wait()
        held = Reservation(prompt, completion)
        self._open.append(held)
        return held

    def settle(self, held: Reservation, prompt: int, completion: int) -> None:
        """The call used so many tokens."""
        self._close(held)
        self.prompt += prompt
        self.completion += completion

    def release(self, held: Reservation) -> None:
        """The call was not served: nothing is spent."""
        self._close(held)

    def keep(self, held: Reservation) -> None:
        """Nobody knows what the call cost: all that was held is spent."""
        self.settle(held, held.prompt, held.completion)
        self.unsettled += held.prompt + held.completion

    def _close(self, held: Reservation) -> None:
        if not held.open:
            raise ValueError("a reservation is settled once")
        held.open = False
        self._open = [other for other in self._open if other is not held]
        self._closed.set()

    def _spent(self, prompt: int, completion: int) -> BudgetError:
        asked = prompt + completion
        if self.tokens is not None and self.prompt + self.completion + asked > self.tokens:
            what = (
                f"of {self.tokens:,} tokens {self.prompt + self.completion:,} are spent, and the next call may use "
                f"{asked:,}"
            )
        else:
            what = f"of {self.price:g} {self.spent:g} is spent, and the next call may cost "
            what += f"{self.prices.of(prompt, completion):g}"
        return BudgetError(
            f"The teacher's budget does not reach: {what}.",
            reason="budget",
            param="teacher.budget_tokens" if self.tokens is not None else "teacher.budget_price",
            hint="All answers so far are kept; raise the budget and run the same command again to go on.",
        )
