"""Hugging Face directories: build a model, load one, save one. config.json plus safetensors; nothing is executed.

Weights are read from a memory map of one shard at a time and copied tensor by tensor, so never held twice. They are
copied even where dtype and device fit the file, for two reasons: a view of the map lies at whatever offset the file
has, and matrix kernels give other last bits on unaligned memory; and a file overwritten in place would kill a process
that still has it mapped.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from dfastllm.core import ModelInfo
from dfastllm.errors import CheckpointError, ModelLoadError, ValidationError
from dfastllm.models.config import DecoderConfig
from dfastllm.models.decoder import Decoder
from dfastllm.models.family import Family, Fields, describe, family_of, find_family, require_expressible
from dfastllm.models.headers import INDEX_FILE, WEIGHTS_FILE, TensorEntry, inventory, read_json
from dfastllm.models.ids import read_ids

__all__ = [
    "DTYPES",
    "build",
    "compare",
    "config_json",
    "load",
    "named_dtype",
    "read_model",
    "save",
    "skeleton",
    "stored_dtype",
]

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
EDIT_FIELD = "edits_committed_tokens"  # ours: LLaDA2.1's config.json does not tell it from LLaDA2.0
NAMED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def build(
    config: DecoderConfig,
    info: ModelInfo,
    *,
    seed: int = 0,
    deviation: float = 0.02,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Decoder:
    """A model with random weights, the same for the same seed on any device: normal with this deviation, the two
    projections into the residual stream scaled by (2 layers) ** -0.5 (Radford et al. 2019); norms 1, biases 0."""
    model = skeleton(config, info, dtype).to_empty(device=device)
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if parameter.ndim == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            scale = deviation * (2 * config.layers) ** -0.5 if residual else deviation
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * scale)
    return model


def skeleton(config: DecoderConfig, info: ModelInfo, dtype: torch.dtype) -> Decoder:
    """The module tree on the meta device: shapes and dtypes, no memory. Raises ValidationError for other dtypes."""
    if dtype not in DTYPES.values():
        raise ValidationError(f"dtype must be float32, bfloat16 or float16, got {dtype}.", param="dtype")
    with torch.device("meta"):
        model = Decoder(config, info)
    for name, parameter in model.named_parameters():
        # The router's bias decides between nearly equal experts: published in float32, kept in float32.
        if not name.endswith("router.bias"):
            parameter.data = parameter.data.to(dtype)
    return model


def read_model(directory: Path, name: str | None = None) -> tuple[Family, DecoderConfig, ModelInfo]:
    """Family, shape and capabilities from the small files of a directory. Raises ModelLoadError (a quantised
    checkpoint is one: its tensors are not this model's parameters)."""
    fields = Fields(read_json(directory / "config.json"), str(directory / "config.json"))
    family = family_of(fields)
    if fields.has("quantization_config"):
        raise ModelLoadError(
            f"{fields.where}: quantised checkpoints are not supported, got {fields.raw['quantization_config']!r:.80}.",
            param="quantization_config",
            hint="Load the original bfloat16 or float32 checkpoint.",
        )
    try:
        config = family.read(fields)
    except ValidationError as error:
        raise ModelLoadError(f"{fields.where}: {error}", param=error.param) from error
    ids = read_ids(directory, fields, family, config.vocab_size)
    block = fields.get(family.block[0], int, family.block[1]) if family.block else None
    edit = fields.get(EDIT_FIELD, bool, False)
    return (
        family,
        config,
        describe(family.name, config, ids, name=name or directory.resolve().name, block=block, edit=edit),
    )


def compare(family: Family, model: nn.Module, found: dict[str, TensorEntry]) -> list[str]:
    """What keeps these tensors from being this model's parameters: missing, unexpected, mis-shaped, of an unknown
    dtype; one sentence each. Empty: it fits."""
    problems = []
    wanted = {family.names.published(own): parameter for own, parameter in model.named_parameters()}
    for name, parameter in wanted.items():
        shape = tuple(parameter.shape)
        if name not in found:
            problems.append(f"missing tensor {name}, wanted {list(shape)}")
        elif found[name].shape != shape:
            problems.append(f"tensor {name} has shape {list(found[name].shape)}, wanted {list(shape)}")
        elif found[name].dtype not in DTYPES:
            problems.append(f"tensor {name} has dtype {found[name].dtype}, wanted one of {', '.join(DTYPES)}")
    tied = family.names.published("lm_head.weight")
    for name in sorted(found.keys() - wanted.keys()):
        if name == tied or any(re.fullmatch(pattern, name) for pattern in family.harmless):
            continue  # a tied head is often written all the same; the embedding is what counts
        problems.append(f"unexpected tensor {name} {list(found[name].shape)}{_beyond(family, name)}")
    return problems


def _beyond(family: Family, name: str) -> str:
    """Why a tensor with a name of this family is not wanted all the same."""
    try:
        family.names.own(name)
    except KeyError:
        return ""
    return " (config.json describes no such layer, expert, bias or norm)"


def load(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    name: str | None = None,
    edit: bool | None = None,
) -> Decoder:
    """A model from a Hugging Face directory, its parameters without gradient. dtype None: the dtype most of its weights
    are stored in. edit: whether it was trained to overwrite committed tokens (LLaDA2.1); None: as config.json says.

    Raises ModelLoadError for an unreadable config, an unsupported family or an unknown device; CheckpointError listing
    every missing, unexpected or mis-shaped tensor, or naming the corrupt file.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise ModelLoadError(f"{directory} is not a model directory.", hint="Give a directory that has a config.json.")
    family, config, info = read_model(directory, name)
    if edit is not None:
        info = replace(info, edit=edit)
    found = inventory(directory)
    model = skeleton(config, info, stored_dtype(found) if dtype is None else named_dtype(dtype))
    problems = compare(family, model, found)
    if problems:
        raise CheckpointError(f"{directory} does not fit family {family.name}: {_listed(problems)}")
    _fill(model, family, found, _device(device))
    return model.requires_grad_(False)


def _listed(problems: list[str], most: int = 12) -> str:
    more = f"; and {len(problems) - most} more" if len(problems) > most else ""
    return "; ".join(problems[:most]) + more + "."


def named_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A torch dtype from its name. Raises ValidationError for a name that is not float32, bfloat16 or float16."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in NAMED:
        raise ValidationError(f"dtype must be {', '.join(NAMED)}, got {dtype!r}.", param="dtype")
    return NAMED[dtype]


def stored_dtype(found: dict[str, TensorEntry]) -> torch.dtype:
    """The dtype that most weights of a checkpoint are stored in; float32 if none is a known one."""
    elements = dict.fromkeys(DTYPES, 0)
    for entry in found.values():
        if entry.dtype in elements:
            elements[entry.dtype] += entry.size
    return DTYPES[max(elements, key=lambda dtype: elements[dtype])]


def _device(wanted: str | torch.device) -> torch.device:
    try:
        return torch.empty(0, device=wanted).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ModelLoadError(f"device {str(wanted)!r} cannot be used here: {reason}", param="device") from error


def _fill(model: Decoder, family: Family, found: dict[str, TensorEntry], device: torch.device) -> None:
    """Replace every meta parameter by a copy of the file's tensor, a shard at a time."""
    by_file: dict[Path, list[tuple[str, str]]] = {}
    for own, _ in model.named_parameters():
        published = family.names.published(own)
        by_file.setdefault(found[published].file, []).append((own, published))
    for file, names in by_file.items():
        try:
            with safe_open(file, framework="pt") as shard:
                for own, published in names:
                    module, _, leaf = own.rpartition(".")
                    parent = model.get_submodule(module)
                    dtype = getattr(parent, leaf).dtype
                    tensor = shard.get_tensor(published).to(device=device, dtype=dtype, copy=True)
                    setattr(parent, leaf, nn.Parameter(tensor))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}.") from error


def save(model: Decoder, path: str | Path, *, files: Iterable[str | Path] = (), shard_bytes: int = 5 * 10**9) -> Path:
    """Write config.json and the weights under their published names; `files` (tokenizer files, a model card) are copied
    beside them. More than `shard_bytes` of weights are split into shards with an index. Every file appears whole or not
    at all, so saving over the directory a model was loaded from is safe. Returns the directory."""
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    family = find_family(model.info.family)
    config = config_json(model)
    tensors = {
        family.names.published(own): parameter.detach().to("cpu").contiguous()
        for own, parameter in model.named_parameters()
    }
    shards = _shards(tensors, shard_bytes)
    for file, names in shards.items():
        with _replacing(directory / file) as temporary:
            save_file({name: tensors[name] for name in names}, temporary, metadata={"format": "pt"})
    where = {name: file for file, names in shards.items() for name in names}
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        _write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": where})
    _drop_stale(directory, set(shards))
    _write_json(directory / "config.json", config)
    for source in map(Path, files):
        with _replacing(directory / source.name) as temporary:
            Path(temporary).write_bytes(source.read_bytes())
    return directory


def config_json(model: Decoder) -> dict[str, Any]:
    """The config.json that `load` reads back to the same shape and capabilities. Raises ValidationError if the family
    has no such shape."""
    family, info = find_family(model.info.family), model.info
    require_expressible(family, model.config)
    eos: int | list[int] | None = list(info.eos_ids) if len(info.eos_ids) > 1 else next(iter(info.eos_ids), None)
    ids = {"eos_token_id": eos, "bos_token_id": info.bos_id, "pad_token_id": info.pad_id}
    raw = {
        "architectures": [family.architectures[0]],
        "model_type": family.model_types[0],
        "dtype": next(name for name, dtype in NAMED.items() if dtype == model.dtype),
        **family.write(model.config),
        **ids,
    }
    if info.mask_id is not None:
        raw["mask_token_id"] = info.mask_id
    if info.edit:
        raw[EDIT_FIELD] = True
    if family.block:
        raw[family.block[0]] = info.block
    return raw


def _shards(tensors: dict[str, torch.Tensor], limit: int) -> dict[str, list[str]]:
    """File name -> tensors, in order, each file at most `limit` bytes unless one tensor alone is larger."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if groups[-1] and size + tensor.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += tensor.nbytes
    if len(groups) == 1:
        return {WEIGHTS_FILE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, 1)}


def _drop_stale(directory: Path, current: set[str]) -> None:
    """Weights of an earlier save under other file names would shadow or contradict these."""
    for old in directory.glob("model*.safetensors"):
        if old.name not in current and re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors", old.name):
            old.unlink()
    if WEIGHTS_FILE in current:
        (directory / INDEX_FILE).unlink(missing_ok=True)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with _replacing(path) as temporary:
        Path(temporary).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


class _replacing:
    """A temporary path beside `path` that takes its place when the block ends well and vanishes when it does not."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> str:
        handle, self.temporary = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        os.close(handle)
        return self.temporary

    def __exit__(self, kind: object, value: object, trace: object) -> None:
        if kind is not None:
            os.unlink(self.temporary)
            return
        os.chmod(self.temporary, 0o644)
        os.replace(self.temporary, self.path)
