"""Small random checkpoints with a byte tokenizer that group formats fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dfastllm.models import save, tiny
from tests.kit.cli_models import write_tokenizer

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 260, "max_len": 256}


def write_tiny(directory: Path, family: str = "llama", **overrides: Any) -> Path:
    ids = write_tokenizer(directory)
    return save(tiny(family, ids=ids, **{**SIZES, **overrides}), directory)
