"""The same model on whatever accelerator there is. Skipped without one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dfastllm import models

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else None
needs_gpu = pytest.mark.skipif(DEVICE is None, reason="no CUDA or MPS device")


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", sorted(models.FAMILIES))
def test_same_logits_as_on_cpu(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    assert DEVICE is not None
    models.save(models.tiny(family, seed=1), tmp_path)
    here, there = models.load(tmp_path), models.load(tmp_path, device=DEVICE, dtype=dtype)
    assert there.device.type == DEVICE
    ids = torch.arange(20)
    wanted = here.head(here(ids, ids, models.dense_attention(1, 20, "causal")))
    on_gpu = ids.to(DEVICE)
    got = there.head(there(on_gpu, on_gpu, models.dense_attention(1, 20, "causal"))).float().cpu()
    if dtype == torch.float32:
        assert (got - wanted).abs().max() < 2e-3
    else:
        assert torch.nn.functional.cosine_similarity(got, wanted, dim=-1).median() > 0.99


@needs_gpu
def test_masks_made_on_the_cpu(tmp_path: Path) -> None:
    assert DEVICE is not None
    model = models.tiny("sdar", device=DEVICE)
    ids = torch.arange(16, device=DEVICE)
    mask = torch.ones(16, 16, dtype=torch.bool).tril()
    block = model(ids, ids, models.dense_attention(1, 16, "block", block=4, mask=mask))
    causal = model(ids, ids, models.dense_attention(1, 16, "causal"))
    assert torch.allclose(block, causal, atol=1e-3)
