"""Adapters made by PEFT itself on our torch module, and forwards of single steps that they are compared in.

PEFT wraps the matrices of a `Decoder` as of any module, so what it computes there is independent of this project's
adapters; its tensors are saved under the names that the family publishes.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from dfastllm.kernels.step import Step
from dfastllm.models import Decoder, dense_attention, find_family, pack_decoder, tiny
from dfastllm.models.basis import basis_of
from dfastllm.models.packed import PackedDecoder

LINEARS = r".*\.(q_proj|k_proj|v_proj|o_proj|qkv_proj|gate_proj|up_proj|down_proj|gate_up_proj)"
ATTENTION = r".*\.(q_proj|k_proj|v_proj|o_proj|qkv_proj)"


def model_of(family: str, **shape: Any) -> Decoder:
    """A small float32 model whose biases and norms are not trivial."""
    model = tiny(family, **shape)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)
            elif "embed" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * parameter.shape[1] ** -0.5)
    return model.requires_grad_(False)


def with_peft(
    model: Decoder,
    directory: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    spread: float = 0.15,
    **config: Any,
) -> Any:
    """PEFT's own model of a copy of `model` with random adapter weights (B and magnitudes too), saved to `directory`
    under published names. spread: of the values of A and B."""
    settings = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LINEARS, **config})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = copy.deepcopy(model)
        base.config = {"model_type": "custom", "vocab_size": model.config.vocab_size}  # type: ignore[assignment]
        made = get_peft_model(base, settings)
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if parameter.requires_grad and "router" not in name:
                    noise = torch.randn(parameter.shape, generator=draw)
                    if "magnitude" in name:
                        parameter.mul_(1 + 0.2 * noise)
                    elif "lora_" in name:
                        parameter.copy_((noise * spread).to(dtype).float())
                    else:
                        parameter.add_(noise * 0.05)
        state = get_peft_model_state_dict(made, save_embedding_layers=False)
    _publish_patterns(model, made, settings)
    for name in [name for name in state if "router.bias" in name]:  # which is no bias of a linear
        del state[name]
    write(directory, settings, {published(model, name): t.to(dtype).contiguous() for name, t in state.items()})
    return made.eval()


def _publish_patterns(model: Decoder, made: Any, settings: LoraConfig) -> None:
    """Ranks and alphas that differ, under the modules' published names."""
    names = find_family(model.info.family).names
    for pattern, held in ((settings.rank_pattern, "r"), (settings.alpha_pattern, "lora_alpha")):
        if not pattern:
            continue
        pattern.clear()
        for own, module in made.base_model.model.named_modules():
            if hasattr(module, held) and isinstance(getattr(module, held), dict):
                published_name = names.published(f"{own}.weight").removesuffix(".weight")
                pattern[published_name] = getattr(module, held)["default"]


def write(directory: Path, settings: LoraConfig, tensors: dict[str, Tensor]) -> None:
    """The two files of an adapter."""
    settings.inference_mode = True
    directory.mkdir(parents=True, exist_ok=True)
    settings.save_pretrained(str(directory))
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, directory / "adapter_model.safetensors")


def published(model: Decoder, key: str) -> str:
    """A tensor's name as PEFT would write it for the published model."""
    names = find_family(model.info.family).names
    inner = key.removeprefix("base_model.model.")
    own, mark, rest = inner.partition(".lora_")
    if not mark:
        own, _, rest = inner.rpartition(".")
        wrapped = own.endswith(".base_layer")
        found = names.published(f"{own.removesuffix('.base_layer')}.{rest}").rpartition(".")[0]
        return f"base_model.model.{found}{'.base_layer' if wrapped else ''}.{rest}"
    return f"base_model.model.{names.published(f'{own}.weight').removesuffix('.weight')}.lora_{rest}"


def pack(model: Decoder, weights: Any = None) -> PackedDecoder:
    """The packed form of the same weights; weights: (name, value) in another form."""
    parts = [(name, p.data) for name, p in model.named_parameters()] if weights is None else weights
    return pack_decoder(model.config, model.info, parts, torch.float32)


def turned(model: Decoder) -> PackedDecoder:
    """The same in another basis."""
    basis = basis_of(model.program, model.info.name, tied=model.config.tied)
    parts = basis.turned((name, p.data) for name, p in model.named_parameters())
    return pack_decoder(model.config, model.info, parts, torch.float32, basis=basis)


def step_of(sequences: Sequence[Sequence[int]], adapters: Sequence[int], *, causal: bool = True) -> Step:
    """A step that runs each sequence whole, every row wanted; adapters: the number of each sequence's."""
    ids, positions, own_slot, limit, numbers, spans, blocks = [], [], [], [], [], [], []
    for sequence, number in zip(sequences, adapters, strict=True):
        rows = len(sequence)
        first = len(blocks)
        spans.append([len(ids), len(ids) + rows, 0, rows, 0, first, 0, -1])
        blocks += range(first, first + -(-rows // 16))
        own_slot += [first * 16 + i for i in range(rows)]
        limit += [i + 1 if causal else rows for i in range(rows)]
        ids += sequence
        positions += range(rows)
        numbers += [number] * rows
    return Step.of(
        {
            "ids": ids,
            "positions": positions,
            "own_slot": own_slot,
            "own_limit": limit,
            "adapter": numbers,
            "want": list(range(len(ids))),
            "spans": spans,
            "own_blocks": blocks,
        }
    )


def wanted(made: Any, sequence: Sequence[int], *, causal: bool = True) -> Tensor:
    """Logits float32 [rows, vocab] of a whole sequence by PEFT's model, or by a `Decoder`."""
    inner = made if isinstance(made, Decoder) else made.base_model.model
    attend = dense_attention(1, len(sequence), "causal" if causal else "full")
    with torch.inference_mode():
        hidden = inner(torch.tensor(sequence), torch.arange(len(sequence)), attend)
        out: Tensor = inner.head(hidden).float()
    return out
