"""Adapters (LoRA and its kin) in the form that every runner reads, and PEFT's directories. No models, no numerics."""

from __future__ import annotations

from dfastllm.lora.adapter import EMBED, HEAD, Adapter, Delta
from dfastllm.lora.config import LoraConfig, read_config
from dfastllm.lora.read import MAX_RANK, Base, read_adapter

__all__ = ["EMBED", "HEAD", "MAX_RANK", "Adapter", "Base", "Delta", "LoraConfig", "read_adapter", "read_config"]
