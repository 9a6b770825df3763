from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.kit.live import Live, serving
from tests.kit.served import Parrot, parrot_engine, random_engine


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def live() -> Iterator[Live]:
    """A masked-diffusion, an autoregressive, a block-diffusion and a scripted model behind one server."""
    engines = {
        "canvas": random_engine("llada"),
        "causal": random_engine("llama", seed=1),
        "blocks": random_engine("sdar", seed=2),
        "parrot": parrot_engine(),
    }
    with serving(engines, max_prompts=32) as running:
        yield running


@pytest.fixture
def parrot(live: Live) -> Iterator[Parrot]:
    """The scripted model, silent again afterwards."""
    model = live.worker.engines["parrot"].model
    assert isinstance(model, Parrot)
    yield model
    model.teach(0, "")
    model.fail = False
