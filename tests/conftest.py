"""Every test draws the same numbers in every run; fixtures of several rooms: of the GGUF tests that compare with
llama.cpp, on float weights and on packed ones."""

from __future__ import annotations

import os
import random
import sys
import types
import zlib
from pathlib import Path
from typing import Any

import pytest

if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined: Triton's kernels run on CPU tensors


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What a test draws without a seed of its own follows from its name: random, numpy and torch, and the seeds that
    the engine gives to requests without one. What is not imported yet is not imported for this."""
    seed = zlib.crc32(item.nodeid.encode())
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)
    admission = sys.modules.get("dfastllm.engine.admission")
    if admission is not None:
        admission.secrets = types.SimpleNamespace(randbits=random.Random(seed).getrandbits)  # type: ignore[attr-defined]


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
