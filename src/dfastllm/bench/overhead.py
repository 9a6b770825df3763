"""What the loop itself costs: the engine on a null model, whose forward takes no time worth measuring."""

from __future__ import annotations

from typing import Any

import torch

from dfastllm.bench.measure import Spread, spread
from dfastllm.core import DecodeParams, ModelInfo, Request, SamplingParams, StepStats
from dfastllm.engine import Engine, EngineConfig

__all__ = ["NullModel", "step_overhead"]


class NullModel:
    """Hidden states of zeros and one fixed table of logits: no arithmetic, so a step's time is the engine's own."""

    dtype = torch.float32

    def __init__(self, kind: Any, vocab: int = 1024) -> None:
        self.info = ModelInfo(
            name=f"null-{kind}",
            family="null",
            kind=kind,
            vocab_size=vocab,
            max_len=4096,
            layers=1,
            kv_heads=1,
            head_dim=1,
            eos_ids=(0,),
            mask_id=None if kind == "ar" else 1,
            block=4 if kind == "block" else 0,
        )
        generator = torch.Generator().manual_seed(0)
        self._logits = torch.randn(8192, vocab, generator=generator)
        self._logits[:, 0] = -50.0  # never EOS

    def __call__(self, ids: torch.Tensor, positions: torch.Tensor, attend: Any) -> torch.Tensor:
        return torch.zeros(ids.shape[0], 1)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._logits[: hidden.shape[0]].clone()


def step_overhead(kind: str, sequences: int, steps: int = 60) -> dict[str, Any]:
    """Microseconds per engine step at a steady number of sequences: decode steps of AR, dual-cache denoise steps of
    diffusion (32-token blocks), block steps of block diffusion. The first steps (prefill, warm-up) are left out."""
    config = EngineConfig(max_batch_rows=1 << 20, max_sequences=sequences, kv_tokens=1 << 18)
    engine = Engine(NullModel(kind), config=config)
    stats: list[StepStats] = []
    engine.subscribe(stats.append)
    decode = DecodeParams(cache="dual", block_length=32) if kind == "diffusion" else None
    for i in range(sequences):
        sampling = SamplingParams(temperature=0, max_tokens=2048 if kind == "ar" else 256)
        engine.add(Request(f"r{i}", tuple(range(2, 66)), sampling, decode))
    for _ in range(10):
        engine.step()
    stats.clear()
    for _ in range(steps):
        engine.step()
    full = [s for s in stats if s.sequences == sequences]
    outside: Spread = spread([(s.seconds - s.run_seconds) * 1e6 for s in full])
    return {
        "kind": kind,
        "sequences": sequences,
        "rows_per_step": full[0].rows,
        "step_us": spread([s.seconds * 1e6 for s in full]),
        "outside_forward_us": outside,
        "per_sequence_us": outside.median / sequences,
    }
