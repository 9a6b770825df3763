"""Whose pipelines are whose: in memory and in the database of tenants, and after the server was started anew."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from dfastllm.errors import PipelineNotFoundError, ValidationError
from dfastllm.server.pipelines.kept import MOST, Pipelines
from dfastllm.server.pipelines.schema import PipelineBody
from dfastllm.server.reading import validated
from dfastllm.tenants import Identity, Key, Tenant
from dfastllm.tenants.store import Store

T = TypeVar("T")


def who(name: str) -> Identity:
    return Identity(Tenant(f"tn-{name}", name), Key(f"key-{name}", f"tn-{name}", frozenset({"pipelines"})))


def body(name: str, text: str = "{{ input }}") -> PipelineBody:
    return validated(PipelineBody, {"name": name, "steps": [{"id": "a", "input": text}]})


def run(work: Awaitable[T]) -> T:
    async def go() -> T:
        return await work

    return asyncio.run(go())


Opened = Callable[[], Pipelines]


@pytest.fixture(params=["memory", "database"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opened]:
    """Gives the server's pipelines; with a database, those of a server started anew each time."""
    if request.param == "memory":
        kept = Pipelines()
        yield lambda: kept
        return
    store = Store(f"sqlite:///{tmp_path / 'tenants.db'}", create=True)
    for name in ("a", "b"):
        store.create_tenant(name, actor="test")
    yield lambda: Pipelines(store=lambda: store)
    store.close()


def test_a_tenant_sees_its_own(opened: Opened) -> None:
    a, b = who("a"), who("b")
    run(opened().save(a, body("one", "{{ input }}!")))
    run(opened().save(b, body("one")))
    run(opened().save(a, body("two")))
    assert [one.name for one in run(opened().all(a))] == ["one", "two"]
    assert [one.name for one in run(opened().all(b))] == ["one"]
    assert run(opened().get(a, "one")).body.steps[0].input == "{{ input }}!"
    assert run(opened().get(b, "one")).body.steps[0].input == "{{ input }}"
    for work in (lambda: opened().get(b, "two"), lambda: opened().delete(b, "two")):
        with pytest.raises(PipelineNotFoundError, match="There is no pipeline 'two'"):
            run(work())
    run(opened().delete(a, "one"))
    assert [one.name for one in run(opened().all(a))] == ["two"]
    assert [one.name for one in run(opened().all(b))] == ["one"]


def test_a_later_one_takes_the_name(opened: Opened) -> None:
    run(opened().save(who("a"), body("one")))
    run(opened().save(who("a"), body("one", "{{ input }}?")))
    assert [one.body.steps[0].input for one in run(opened().all(who("a")))] == ["{{ input }}?"]


def test_so_many_and_no_more(opened: Opened) -> None:
    for number in range(MOST):
        run(opened().save(who("a"), body(f"p{number}")))
    run(opened().save(who("a"), body("p0", "again")))
    with pytest.raises(ValidationError, match=f"a tenant may keep {MOST} pipelines"):
        run(opened().save(who("a"), body("more")))
    run(opened().save(who("b"), body("more")))
