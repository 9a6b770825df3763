"""Tensor names of PEFT: which module of the base a tensor belongs to, and what it is there.

    base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight     module model.layers.3.self_attn.q_proj, part a
    base_model.model.lm_head.weight                                    module lm_head, part full (modules_to_save)

The experts of a mixture are one parameter in newer releases of transformers, and their adapters one tensor, in which
the ranks of all experts follow one another; `experts_of` takes it apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor

from dfastllm.core import value
from dfastllm.errors import AdapterError

__all__ = ["EXPERTS", "Key", "experts_of", "finite", "parse_key"]

PREFIX = "base_model.model."
EXPERTS = re.compile(r"(.*\.experts)(\.base_layer)*")  # a module: the experts of a layer as one parameter
_PARTS = (  # end of a name (the adapter's own name, "default", is left in by some) -> part
    (re.compile(r"\.lora_A(\.default)?\.weight$"), "a"),
    (re.compile(r"\.lora_B(\.default)?\.weight$"), "b"),
    (re.compile(r"\.lora_B(\.default)?\.bias$"), "b_bias"),
    (re.compile(r"\.lora_embedding_A(\.default)?$"), "embed_a"),
    (re.compile(r"\.lora_embedding_B(\.default)?$"), "embed_b"),
    (re.compile(r"\.lora_magnitude_vector(\.default)?(\.weight)?$"), "magnitude"),
    (re.compile(r"\.base_layer\.weight$"), "base"),
    (re.compile(r"(\.base_layer)?\.bias$"), "bias"),
    (re.compile(r"(\.modules_to_save)?(\.default)?\.weight$"), "full"),
)


@value(frozen=True, slots=True)
class Key:
    """What a tensor of the file is.

    name    in the file.
    module  of the base, by its published name.
    part    a, b, b_bias, embed_a, embed_b, magnitude, bias, full, or base: a frozen matrix of the base itself, which
            PEFT writes beside the adapter of an embedding.
    """

    name: str
    module: str
    part: str


def parse_key(name: str, where: str) -> Key:
    """Raises AdapterError for a tensor that is no part of a LoRA adapter."""
    for pattern, part in _PARTS:
        if found := pattern.search(name):
            return Key(name, name[: found.start()].removeprefix(PREFIX), part)
    raise AdapterError(f"{where}: tensor {name} is no part of a LoRA adapter.", param=name)


def experts_of(a: Tensor, b: Tensor, experts: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(A [rank, in], B [out, rank]) of each expert out of A [experts * rank, in], whose rows are the ranks of one
    expert after the other, and B [out, rank * experts], in which the experts alternate."""
    low = a.view(experts, -1, a.shape[1])
    high = b.view(b.shape[0], -1, experts)
    for i in range(experts):
        yield low[i], high[:, :, i]


def finite(name: str, tensor: Tensor, where: str) -> Tensor:
    """The tensor itself. Raises AdapterError for NaN or infinity."""
    if not bool(torch.isfinite(tensor).all()):
        raise AdapterError(
            f"{where}: {name} holds values that are not finite (NaN or infinity).",
            param=name,
            hint="The training of the adapter has diverged, or the file is damaged.",
        )
    return tensor
