"""The shipped demo models behind one server, as `dfastllm serve` without flags serves them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from dfastllm.engine import EngineConfig
from dfastllm.llm import load_engine, shipped_models
from tests.kit.live import Live, serving
from tests.server.test_concurrent import all_at_once, alone, cases

pytestmark = pytest.mark.skipif(not shipped_models(), reason="no demo models are shipped yet")
SMALL = EngineConfig(kv_tokens=16384)


@pytest.fixture(scope="module")
def demo() -> Iterator[Live]:
    with serving({name: load_engine(name, config=SMALL) for name in shipped_models()}) as running:
        yield running


def test_all_are_listed(demo: Live) -> None:
    assert [model.id for model in demo.client().models.list()] == shipped_models()


@pytest.mark.slow
def test_mixed_requests_at_once_equal_their_solo_results(demo: Live) -> None:
    names = {demo.serving.models[name].info.kind: name for name in reversed(shipped_models())}
    kinds = {"canvas": "diffusion", "causal": "ar", "blocks": "block"}
    served = {local: names[kind] for local, kind in kinds.items() if kind in names}
    wanted = [case for case in cases(32) if case.model in served]
    engines = {local: load_engine(name, config=SMALL) for local, name in served.items()}
    solo = [alone(engines, case) for case in wanted]
    together = asyncio.run(all_at_once(demo, wanted, served))
    for case, one, many in zip(wanted, solo, together, strict=True):
        assert many == one, case
