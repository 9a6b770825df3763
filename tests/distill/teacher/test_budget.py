"""The bound holds whatever calls do, and nobody is refused while others may still give back."""

from __future__ import annotations

import asyncio
import random

import pytest

from dfastllm.distill.teacher.budget import Budget, Prices
from dfastllm.errors import BudgetError, TeacherError


def test_a_call_waits_for_what_others_hold() -> None:
    async def go() -> list[str]:
        budget, order = Budget(tokens=100), []
        first = await budget.reserve(40, 40)

        async def second() -> None:
            await budget.reserve(20, 20)
            order.append("second")

        waiting = asyncio.create_task(second())
        await asyncio.sleep(0)
        order.append("first")
        budget.settle(first, 40, 5)
        await waiting
        assert (budget.prompt, budget.completion) == (40, 5)
        return order

    assert asyncio.run(go()) == ["first", "second"]


def test_what_does_not_fit_at_all_is_told() -> None:
    budget = Budget(price=1.0, prices=Prices(prompt=2.0, completion=10.0), prompt=300_000)
    assert budget.spent == pytest.approx(0.6)
    assert budget.fits(200_000, 0)  # exactly all of it
    with pytest.raises(BudgetError, match=r"of 1 0\.6 is spent, and the next call may cost 0\.5") as told:
        asyncio.run(budget.reserve(0, 50_000))
    assert told.value.param == "teacher.budget_price"
    assert isinstance(told.value, TeacherError)


def test_an_unknown_outcome_stays_spent_and_a_refusal_costs_nothing() -> None:
    budget = Budget(tokens=100)
    budget.keep(asyncio.run(budget.reserve(30, 30)))
    assert (budget.unsettled, budget.prompt + budget.completion) == (60, 60)
    held = asyncio.run(budget.reserve(20, 20))
    budget.release(held)
    assert budget.prompt + budget.completion == 60
    with pytest.raises(ValueError, match="once"):
        budget.settle(held, 1, 1)


@pytest.mark.parametrize("seed", range(5))
def test_the_bound_holds_for_calls_at_once(seed: int) -> None:
    rng = random.Random(seed)

    async def go() -> tuple[int, int, int]:
        budget = Budget(tokens=1000)
        served = refused = most = 0

        async def call() -> None:
            nonlocal served, refused, most
            prompt, completion = rng.randint(1, 40), rng.randint(1, 40)
            try:
                held = await budget.reserve(prompt, completion)
            except BudgetError:
                refused += 1
                return
            for _ in range(rng.randint(0, 3)):
                await asyncio.sleep(0)
            what = rng.choice(["settle", "keep", "release"])
            if what == "settle":
                budget.settle(held, prompt, rng.randint(0, completion))
            else:
                (budget.keep if what == "keep" else budget.release)(held)
            served += 1
            most = max(most, budget.prompt + budget.completion)

        await asyncio.gather(*(call() for _ in range(120)))
        return served, refused, most

    served, refused, most = asyncio.run(go())
    assert served + refused == 120
    assert refused > 0
    assert 900 < most <= 1000
