"""Small random models of any family: for tests and demonstrations, and for measuring shapes without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dfastllm.errors import ValidationError
from dfastllm.models.checkpoint import build, named_dtype, read_model
from dfastllm.models.config import DecoderConfig
from dfastllm.models.decoder import Decoder
from dfastllm.models.family import Ids, describe, find_family, require_expressible

__all__ = ["random_like", "tiny", "tiny_config"]

BODY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 8,
    "max_len": 256,
}


def tiny_config(family: str, **overrides: Any) -> DecoderConfig:
    """The family's wiring at a tiny size; `overrides` are fields of DecoderConfig (head_dim follows hidden_size and
    heads). Raises ValidationError for an unknown field and for a shape the family cannot have."""
    found = find_family(family)
    unknown = overrides.keys() - DecoderConfig.__dataclass_fields__.keys()
    if unknown:
        raise ValidationError(f"unknown config field(s) {', '.join(sorted(unknown))}.", param=min(unknown))
    shape = {**BODY, **found.shape, **overrides}
    if "head_dim" not in overrides and overrides.keys() & {"hidden_size", "heads"}:
        shape["head_dim"] = shape["hidden_size"] // shape["heads"]
    config = DecoderConfig(**{name: value(shape) if callable(value) else value for name, value in shape.items()})
    require_expressible(found, config)
    return config


def tiny(
    family: str,
    seed: int = 0,
    *,
    ids: Ids | None = None,
    block: int | None = None,
    edit: bool = False,
    name: str = "",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> Decoder:
    """A random model of the family, the same for the same arguments, its weights large enough (deviation 0.2) that
    every part of it matters to the logits. The last ids of the vocabulary are mask (if the family has one), EOS and BOS
    unless `ids` says otherwise."""
    config = tiny_config(family, **overrides)
    last = config.vocab_size - 1
    masked = find_family(family).kind != "ar"
    given = ids or Ids(eos=(last - 1,), mask=last if masked else None, bos=last - 2, pad=last - 1)
    info = describe(family, config, given, name=name or f"tiny-{family}", block=block, edit=edit)
    return build(config, info, seed=seed, deviation=0.2, device=device, dtype=dtype)


def random_like(
    path: str | Path, seed: int = 0, *, device: str | torch.device = "cpu", dtype: torch.dtype | str = torch.bfloat16
) -> Decoder:
    """Random weights in the real shape that a directory's config.json describes; no weight files are needed. For
    measuring speed and memory: its texts mean nothing. Raises ModelLoadError as `load` does."""
    _, config, info = read_model(Path(path))
    return build(config, info, seed=seed, device=device, dtype=named_dtype(dtype))
