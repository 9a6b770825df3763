"""Reading an adapter from a directory as PEFT writes it: adapter_config.json and adapter_model.safetensors.

Everything that can be checked before a tensor is read is checked from the header alone: names, shapes, ranks, bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from dfastllm.lora.adapter import Adapter

__all__ = ["MAX_RANK", "Base", "read_adapter"]

MAX_RANK = 512


class Base(Protocol):
    """What reading an adapter needs of the model that it is for; `dfastllm.models.adapter_base` gives it.

    name    of the model, for messages.
    shapes  own parameter name ("layers.3.attn.q_proj.weight") -> its shape.
    tied    whether the head is the embedding's matrix.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    tied: bool

    def own(self, published: str) -> str:
        """The own name of a published parameter name. KeyError for a name that the model's family does not know."""
        ...

    def value(self, own: str) -> Tensor:
        """A parameter as float32, a quantised one expanded."""
        ...


def read_adapter(path: str | Path, base: Base, *, max_rank: int = MAX_RANK, max_bytes: int | None = None) -> Adapter:
    """The adapter of a PEFT directory, for this base. max_rank: of any of its matrices. max_bytes: of its tensors.

    Raises AdapterError, which names the file, the tensor or the key: no directory, no adapter_config.json, pickled
    weights, a key that asks for other mathematics, a tensor of another base, of a wrong shape or rank, or with NaN or
    infinity, too many bytes.
    """
    raise NotImplementedError
