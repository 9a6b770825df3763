"""Models: one decoder, shaped and named by published wirings; reading and writing Hugging Face directories.

A model maps token rows to hidden states and hidden rows to logits. It holds no cache, knows no masks and samples
nothing: `attend`, given by the caller, is the only place where rows meet. Importing this room imports torch and never
transformers; no code of a checkpoint is ever run.
"""

from dfastllm.models import wirings  # noqa: F401  (importing a wiring registers its families)
from dfastllm.models.adapted import adapter_base
from dfastllm.models.check import CheckReport, Problem, check
from dfastllm.models.checkpoint import build, load, save
from dfastllm.models.config import DecoderConfig, MoEConfig, RopeScaling
from dfastllm.models.decoder import Decoder
from dfastllm.models.device import DeviceDecoder, device_decoder
from dfastllm.models.family import FAMILIES, Family, Ids, describe, find_family
from dfastllm.models.pack import pack_decoder
from dfastllm.models.packed import PackedDecoder
from dfastllm.models.parts import AttendFunction, dense_attention
from dfastllm.models.program import Attend, Program
from dfastllm.models.tiny import random_like, tiny, tiny_config

__all__ = [
    "FAMILIES",
    "Attend",
    "AttendFunction",
    "CheckReport",
    "Decoder",
    "DecoderConfig",
    "DeviceDecoder",
    "Family",
    "Ids",
    "MoEConfig",
    "PackedDecoder",
    "Problem",
    "Program",
    "RopeScaling",
    "adapter_base",
    "build",
    "check",
    "dense_attention",
    "describe",
    "device_decoder",
    "find_family",
    "load",
    "pack_decoder",
    "random_like",
    "save",
    "tiny",
    "tiny_config",
]
