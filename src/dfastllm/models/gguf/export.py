"""Writing a model as a GGUF file that llama.cpp reads, of the families that it has an architecture for.

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
from dfastllm.models.family import FAMILIES, Gguf, find_family
from dfastllm.models.gguf.names import SAMPLING, SETTINGS, interleave, row_order
from dfastllm.models.gguf.rope import factors_of, write_scaling
from dfastllm.models.headers import inventory
from dfastllm.models.program import offsets
from dfastllm.quant.checkpoint import stored
from dfastllm.quant.gguf import FILE_TYPES, Planned, type_for, write_file

__all__ = ["write_gguf"]

# Fields of DecoderConfig that a file of any architecture says.
_SAID = {
    "vocab_size", "hidden_size", "intermediate_size", "layers", "heads", "kv_heads", "head_dim", "max_len",
    "rope_theta", "rope_scaling", "norm_eps", "tied",
}  # fmt: skip
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
    gguf = _architecture(info.family, config)
    lesser = type in ("Q4_0", "Q4_1", "Q5_0", "Q5_1")
    head = ("Q8_0" if lesser else type) if head is None else head
    top = "token_embd.weight" if config.tied else "output.weight"
    planned = []
    for published, factors in factors_of(config).items():
        planned.append(Planned(f"{published}.weight", tuple(factors.shape), "F32", _from_memory(factors)))
    added = offsets(find_family(info.family).program(config))
    stacked: dict[str, list[str]] = {}  # a mixture's experts share a tensor
    for own in shapes:
        stacked.setdefault(gguf.names.published(own), []).append(own)
    for published, members in stacked.items():
        own, shape = members[0], shapes[members[0]]
        wanted = head if published == top else type
        kept = "F32" if ".router." in own else type_for(shape, wanted)
        read = _prepared(parameters[own], row_order(own, config, gguf, interleave), added.get(own, 0.0))
        if ".experts." in own:
            read, shape = _stacked([parameters[name] for name in members]), (len(members), *shape)
        planned.append(Planned(published, shape, kept, read))
    own_fields = _metadata(gguf, config, info, name or info.name, type)
    metadata = {**own_fields, **(tokenizer or _NO_TOKENIZER), **_ids(info)}
    return write_file(Path(path), metadata, planned, progress)


_NO_TOKENIZER = {"tokenizer.ggml.model": "none"}


def _ids(info: ModelInfo) -> dict[str, Any]:
    """The model's own ids. GGUF has three places for ids that end a text; more are known by their text alone."""
    ends = dict(zip(("eos", "eot", "eom"), info.eos_ids, strict=False))
    roles = {"bos": info.bos_id, "padding": info.pad_id, "mask": info.mask_id, **ends}
    return {f"tokenizer.ggml.{role}_token_id": token for role, token in roles.items() if token is not None}


def _architecture(family: str, config: DecoderConfig) -> Gguf:
    gguf = find_family(family).gguf
    if gguf is None:
        known = ", ".join(sorted(name for name, found in FAMILIES.items() if found.gguf))
        raise ValidationError(f"family {family} has no GGUF architecture here; supported: {known}.", param="family")
    for name, field in DecoderConfig.__dataclass_fields__.items():
        if name not in _SAID | gguf.fields and getattr(config, name) != field.default:
            if name == "rope_dim" and config.rotary_dim == config.head_dim:
                continue
            raise ValidationError(
                f"GGUF architecture {gguf.arch} has no place for {name}={getattr(config, name)!r:.80}.", param=name
            )
    if not gguf.free_dim and config.heads * config.head_dim != config.hidden_size:
        raise ValidationError(f"GGUF architecture {gguf.arch} needs heads * head_dim equal to the hidden size.")
    if config.rope_scaling is not None and config.rope_scaling.kind not in gguf.scalings:
        raise ValidationError(
            f"llama.cpp does not compute {config.rope_scaling.kind} rope scaling in architecture {gguf.arch}.",
            param="rope_scaling",
        )
    return gguf


def _metadata(gguf: Gguf, config: DecoderConfig, info: ModelInfo, name: str, type: str) -> dict[str, Any]:
    arch = gguf.arch
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
        f"{arch}.rope.dimension_count": config.rotary_dim,
        f"{arch}.rope.freq_base": float(config.rope_theta),
        **write_scaling(config, arch),
        **{f"{arch}.{key}": value for key, value in gguf.write(config).items()},
    }
    for key, field in SETTINGS.items():
        value = getattr(config, field)
        if field in gguf.fields and field != "moe" and value != DecoderConfig.__dataclass_fields__[field].default:
            fields.setdefault(f"{arch}.{key}", value)
    fields |= {key: info.defaults[option] for option, key in SAMPLING.items() if option in info.defaults}
    if info.kind != "ar":
        fields[f"{arch}.attention.causal"] = False
        fields["diffusion.shift_logits"] = bool(info.shift)
    return fields


def _prepared(read: Reader, order: Tensor | None, added: float) -> Reader:
    def prepared() -> Tensor:
        value = read() if order is None else read()[order]
        return value.float() + added if added else value

    return prepared


def _stacked(reads: list[Reader]) -> Reader:
    return lambda: torch.stack([read() for read in reads])


def _from_memory(value: Tensor) -> Reader:
    return lambda: value.detach().cpu()


def _from_directory(
    directory: Path,
) -> tuple[DecoderConfig, ModelInfo, dict[str, Reader], dict[str, tuple[int, ...]]]:
    family, config, info = read_model(directory)
    found = inventory(directory)
    if quant_config(directory, found) is not None:
        raise ValidationError(f"{directory} is quantised already.", hint="Convert the original float checkpoint.")
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
