"""Sizes and limits of one engine. Data only; validated on construction."""

from __future__ import annotations

from dataclasses import dataclass, fields

from dfastllm.errors import ValidationError

__all__ = ["EngineConfig"]


@dataclass(frozen=True)
class EngineConfig:
    """max_batch_rows  token budget of a step: rows through the linear layers. One canvas larger than it runs alone.
    prefill_chunk      most prompt rows of one sequence in a step, so that a long prompt does not hold up the others.
    max_sequences      sequences holding K,V pages or decoder state at once.
    max_waiting        waiting requests before `add` raises QueueFullError.
    page_size          positions per K,V page.
    kv_tokens          K,V positions of all sequences together (rounded up to pages).
    ageing_steps       every so many steps waited count as one level of priority, so nothing starves. 0: no ageing.
    gpu_memory_utilization  share of a card's whole memory that may be in use: K,V get what is left of it, in place of
                       `kv_tokens`. None: as many as those. On a CPU it means nothing.
    min_rows           a forward is padded to this many rows; None: 8 per CPU thread, at least 16. Matrix products of
                       fewer rows use other kernels with another order of summation, so without padding a request's last
                       bits would depend on its neighbours (measured: LOG.md). 1: no padding.
    max_len            positions a sequence may have; None: the model's own limit.
    prefix_caching     requests share the K,V of a common beginning, where the model's can be shared (see `prefix`).
    max_loras          LoRA adapters in memory at once; lora_memory: bytes that they may take together.
    max_lora_rank      largest rank of one.
    """

    max_batch_rows: int = 2048
    prefill_chunk: int = 512
    max_sequences: int = 64
    max_waiting: int = 1024
    page_size: int = 16
    kv_tokens: int = 65536
    gpu_memory_utilization: float | None = None
    ageing_steps: int = 64
    min_rows: int | None = None
    max_len: int | None = None
    prefix_caching: bool = True
    max_loras: int = 64
    lora_memory: int = 1 << 30
    max_lora_rank: int = 512

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "gpu_memory_utilization":
                if value is not None and not 0 < value <= 1:
                    raise ValidationError(f"{f.name} must be above 0 and at most 1, got {value}.", param=f.name)
                continue
            least = 0 if f.name == "ageing_steps" else 1
            if value is not None and not isinstance(value, bool) and value < least:
                raise ValidationError(f"{f.name} must be at least {least}, got {value}.", param=f.name)
