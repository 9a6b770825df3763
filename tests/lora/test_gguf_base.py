"""An adapter over a base that came out of a GGUF file: it is the same adapter as over the file's weights as floats, and
what it changes is what it changes there, but for the rounding that the format has without any adapter too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from tests.kit.adapters import ATTENTION, LINEARS, step_of, wanted, with_peft
from tests.soak.real_adapter import cached_file, float_model, nearness

from dfastllm import assemble
from dfastllm.convert.gguf import quantise_gguf
from dfastllm.engine.runners.native import NativeRunner
from dfastllm.kernels import native
from dfastllm.lora import read_adapter
from dfastllm.models import Decoder, adapter_base

pytestmark = [
    pytest.mark.skipif(native() is None, reason="no native kernels"),
    pytest.mark.filterwarnings("ignore"),
]
IDS = [5, 90, 411, 33, 17, 202, 8, 64, 700, 12]
KINDS: dict[str, dict[str, Any]] = {
    "linears": {"target_modules": LINEARS},
    "dora": {"target_modules": ATTENTION, "use_dora": True},
    "embedding": {"target_modules": rf"{ATTENTION}|embed"},
}


@pytest.fixture(scope="module", params=["gguf-q8_0", "gguf-q4_0"])
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantise_gguf("demo-draft", tmp_path_factory.mktemp("gguf") / "base.gguf", request.param)


@pytest.mark.parametrize("kind", KINDS)
def test_over_the_file_and_over_its_floats(file: Path, kind: str, tmp_path: Path) -> None:
    floats = assemble.dequantised(file, torch.float32).model
    assert isinstance(floats, Decoder)
    made = with_peft(floats, tmp_path, **KINDS[kind])
    held = assemble.load(file, backend="native").model
    runner = NativeRunner(held, 64, torch.float32, 16)  # type: ignore[arg-type]
    adapter = read_adapter(tmp_path, adapter_base(held))  # type: ignore[arg-type]
    assert (
        adapter.hash == read_adapter(tmp_path, adapter_base(floats)).hash
    )  # DoRA's norms are those of the same weights
    runner.adapters([None, adapter])
    got = runner.run(step_of([IDS, IDS], [1, 0])).logits()
    changed, plain = wanted(made, IDS), wanted(floats, IDS)
    assert (changed - plain).abs().mean() > 0.3  # it does something

    def rounding(found: torch.Tensor, exact: torch.Tensor) -> float:
        return ((found - exact).square().mean() / exact.square().mean()).sqrt().item()

    law = rounding(got[len(IDS) :], plain)
    assert rounding(got[: len(IDS)], changed) < 2.5 * law < 0.2


@pytest.mark.slow
def test_a_real_model_with_an_adapter_of_peft(tmp_path: Path) -> None:
    """SmolLM2-135M out of its file; `scripts/real-adapter` trains one and shows what it says."""
    file = cached_file()
    if file is None:
        pytest.skip("SmolLM2-135M's file is not in the cache: scripts/real-adapter fetches it")
    from peft import LoraConfig

    torch.manual_seed(1)
    made = get_peft_model(
        float_model(file), LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    made.save_pretrained(str(tmp_path))
    del made
    found = nearness(file, tmp_path, [[1, 9690, 198, 1780, 314, 3908, 47, 2, 198, 1, 520, 9531, 198]])
    assert found.change > 0.05  # it does something
    assert found.exact < 2e-3
    assert found.same == 1.0
    assert found.kl < 3 * found.kl_base
