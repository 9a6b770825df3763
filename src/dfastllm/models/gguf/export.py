"""Writing a model as a GGUF file that llama.cpp reads: llama, mistral, qwen2, qwen3, llada, dream.

Metadata and names follow llama.cpp's own converters. Tensors are read from their safetensors shard (or a built model)
one at a time, reordered where llama.cpp's rotary pairs differ, encoded and written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from dfastllm.core import ModelInfo
from dfastllm.errors import CheckpointError, ValidationError
from dfastllm.models.checkpoint import compare, quant_config, read_model, skeleton
from dfastllm.models.config import DecoderConfig
from dfastllm.models.decoder import Decoder
from dfastllm.models.gguf.names import INTERLEAVED, NAMES, interleave
from dfastllm.models.gguf.rope import factors_of, write_scaling
from dfastllm.models.headers import inventory
from dfastllm.quant.checkpoint import stored
from dfastllm.quant.gguf import FILE_TYPES, Planned, type_for, write_file

__all__ = ["write_gguf"]

_ARCH = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "llada": "llada", "dream": "dream"}
# What llama.cpp loads for each architecture beside the plain tensors.
_CAN = {"llama": {"qkv_bias", "out_bias", "mlp_bias"}, "qwen2": {"qkv_bias"}, "qwen3": {"qk_norm"}, "llada": set()}
_CAN["dream"] = _CAN["qwen2"]
Reader = Callable[[], Tensor]


def write_gguf(
    model: Decoder | str | Path,
    path: str | Path,
    type: str = "F16",
    *,
    head: str | None = None,
    tokenizer: Mapping[str, Any] | None = None,
    name: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write `model`, a built decoder or a Hugging Face directory, to `path`. Returns the path.

    type: of the matrices; F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1 or Q8_0. Norms and biases stay F32; rows that the
    blocks do not divide become F16. head: type of the head's matrix (of the embedding, where they are tied); None:
    Q8_0 where `type` has fewer bits, else `type`. tokenizer: metadata of its own (text.gguf makes it); None: the file
    says it has none. progress: called with (bytes written, bytes in all).

    Raises ValidationError for another type, a family or shape that llama.cpp's architectures cannot hold, and weights
    that are not finite; CheckpointError where the directory's tensors do not fit its config.
    """
    if isinstance(model, Decoder):
        config, info = model.config, model.info
        parameters = {own: _from_memory(value) for own, value in model.named_parameters()}
        shapes = {own: tuple(value.shape) for own, value in model.named_parameters()}
    else:
        config, info, parameters, shapes = _from_directory(Path(model))
    arch = _architecture(info.family, config)
    lesser = type in ("Q4_0", "Q4_1", "Q5_0", "Q5_1")
    head = ("Q8_0" if lesser else type) if head is None else head
    top = "token_embd.weight" if config.tied else "output.weight"
    planned = []
    factors = factors_of(config)
    if factors is not None:
        planned.append(Planned("rope_freqs.weight", tuple(factors.shape), "F32", _from_memory(factors)))
    for own, shape in shapes.items():
        published = NAMES.published(own)
        wanted = head if published == top else type
        order = _order(own, config) if arch in INTERLEAVED else None
        read = parameters[own] if order is None else _reordered(parameters[own], order)
        planned.append(Planned(published, shape, type_for(shape, wanted), read))
    own_fields = _metadata(arch, config, info, name or info.name, type)
    metadata = {**own_fields, **(tokenizer or _NO_TOKENIZER), **_ids(info)}
    return write_file(Path(path), metadata, planned, progress)


_NO_TOKENIZER = {"tokenizer.ggml.model": "none"}


def _ids(info: ModelInfo) -> dict[str, Any]:
    """The model's own ids. GGUF has three places for ids that end a text; more are known by their text alone."""
    ends = dict(zip(("eos", "eot", "eom"), info.eos_ids, strict=False))
    roles = {"bos": info.bos_id, "padding": info.pad_id, "mask": info.mask_id, **ends}
    return {f"tokenizer.ggml.{role}_token_id": token for role, token in roles.items() if token is not None}


def _architecture(family: str, config: DecoderConfig) -> str:
    if family not in _ARCH:
        raise ValidationError(
            f"family {family} has no GGUF architecture here; supported: {', '.join(sorted(_ARCH))}.", param="family"
        )
    arch = _ARCH[family]
    for flag in ("qkv_bias", "out_bias", "mlp_bias", "qk_norm", "fused_qkv"):
        if getattr(config, flag) and flag not in _CAN[arch]:
            raise ValidationError(f"GGUF architecture {arch} has no {flag}.", param=flag)
    if config.rotary_dim != config.head_dim:
        raise ValidationError(f"GGUF architecture {arch} rotates whole heads, not {config.rotary_dim} dims.")
    if arch in ("qwen2", "dream") and config.heads * config.head_dim != config.hidden_size:
        raise ValidationError(f"GGUF architecture {arch} needs heads * head_dim equal to the hidden size.")
    if config.rope_scaling is not None and config.rope_scaling.kind == "llama3" and arch != "llama":
        raise ValidationError(f"llama.cpp ignores llama3 rope scaling in architecture {arch}.", param="rope_scaling")
    return arch


def _metadata(arch: str, config: DecoderConfig, info: ModelInfo, name: str, type: str) -> dict[str, Any]:
    if type not in FILE_TYPES:
        raise ValidationError(f"type must be one of {', '.join(sorted(FILE_TYPES))}, got {type!r}.", param="type")
    fields: dict[str, Any] = {
        "general.architecture": arch,
        "general.type": "model",
        "general.name": name,
        "general.quantization_version": 2,
        "general.file_type": FILE_TYPES[type],
        f"{arch}.vocab_size": config.vocab_size,
        f"{arch}.context_length": config.max_len,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.block_count": config.layers,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.heads,
        f"{arch}.attention.head_count_kv": config.kv_heads,
        f"{arch}.attention.key_length": config.head_dim,
        f"{arch}.attention.value_length": config.head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": float(config.norm_eps),
        f"{arch}.rope.dimension_count": config.head_dim,
        f"{arch}.rope.freq_base": float(config.rope_theta),
        **write_scaling(config, arch),
    }
    if info.kind != "ar":
        fields[f"{arch}.attention.causal"] = False
        fields["diffusion.shift_logits"] = bool(info.shift)
    return fields


def _order(own: str, config: DecoderConfig) -> Tensor | None:
    if ".attn.q_proj." in own:
        return interleave(config.heads, config.head_dim)
    if ".attn.k_proj." in own:
        return interleave(config.kv_heads, config.head_dim)
    return None


def _reordered(read: Reader, order: Tensor) -> Reader:
    return lambda: read()[order]


def _from_memory(value: Tensor) -> Reader:
    return lambda: value.detach().cpu()


def _from_directory(
    directory: Path,
) -> tuple[DecoderConfig, ModelInfo, dict[str, Reader], dict[str, tuple[int, ...]]]:
    family, config, info = read_model(directory)
    if quant_config(directory) is not None:
        raise ValidationError(f"{directory} is quantised already.", hint="Convert the original float checkpoint.")
    found = inventory(directory)
    model = skeleton(config, info, torch.float32)
    problems = compare(family, model, stored(found))
    if problems:
        raise CheckpointError(f"{directory} does not fit family {family.name}: {'; '.join(problems[:12])}.")

    def reader(published: str) -> Reader:
        def read() -> Tensor:
            with safe_open(found[published].file, framework="pt") as shard:
                value: Tensor = shard.get_tensor(published).clone()
            return value

        return read

    shapes = {own: tuple(value.shape) for own, value in model.named_parameters()}
    return config, info, {own: reader(family.names.published(own)) for own in shapes}, shapes
