"""Fixtures of several rooms: of the GGUF tests that compare with llama.cpp, on float weights and on packed ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def llama() -> Any:
    pytest.importorskip("llama_cpp")
    return pytest.importorskip("tests.kit.gguf_reference")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """A float file whose rows 256-element super-blocks divide, and the columns of its matrices."""
    # here, so that tests which need no torch start without it
    from dfastllm.models import Ids, build, describe, tiny_config
    from dfastllm.models.gguf import write_gguf
    from dfastllm.quant.gguf import GgufFile

    config = tiny_config("llama", hidden_size=256, heads=4, kv_heads=2, intermediate_size=256, vocab_size=128, layers=1)
    model = build(config, describe("llama", config, Ids()), deviation=0.12)
    path = write_gguf(model, tmp_path_factory.mktemp("gguf") / "f32.gguf", "F32")
    with GgufFile.open(path) as file:
        return path, {tensor.name: tensor.shape[1] for tensor in file.tensors.values() if len(tensor.shape) == 2}
