"""Hugging Face directories: build a model, load one, save one. config.json plus safetensors; nothing is executed.

Weights are read tensor by tensor into memory of their own, so never held twice: a view of a map lies at whatever offset
the file has, and matrix kernels give other last bits on unaligned memory; a file overwritten in place would kill a
process that still has it mapped; and mapped pages count as resident beside the copy made of them.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from dfastllm.core import ModelInfo
from dfastllm.errors import CheckpointError, ModelLoadError, ValidationError
from dfastllm.kernels.packed import QTensor
from dfastllm.models.basis import Basis, basis_of
from dfastllm.models.bigram import FILE as BIGRAM_FILE
from dfastllm.models.config import DecoderConfig, require_held
from dfastllm.models.decoder import Decoder
from dfastllm.models.family import Family, Fields, describe, family_of, find_family, require_expressible, sums_of
from dfastllm.models.headers import INDEX_FILE, WEIGHTS_FILE, TensorEntry, inventory, read_json
from dfastllm.models.ids import read_defaults, read_ids, usable
from dfastllm.options import generation_config
from dfastllm.quant.checkpoint import METHOD, QuantConfig, Stored, read_one, stored
from dfastllm.quant.formats import FORMATS
from dfastllm.quant.published import Method, by_config, by_names
from dfastllm.quant.stream import cut_shards, read_tensor, same_numbers

__all__ = [
    "DTYPES",
    "basis_in",
    "build",
    "compare",
    "config_json",
    "fill",
    "listed",
    "load",
    "named_dtype",
    "quant_config",
    "quantisable",
    "read_model",
    "read_stored",
    "read_weights",
    "save",
    "skeleton",
    "stored_dtype",
    "weights_in",
]

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
EDIT_FIELD = "edits_committed_tokens"  # ours: LLaDA2.1's config.json does not tell it from LLaDA2.0
# Files beside config.json that say how a checkpoint is quantised, of programs that once wrote them: name -> method.
ASIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
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
    model.seed = seed
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if parameter.ndim == 1:
                offset = getattr(model.get_submodule(name.rpartition(".")[0]), "offset", 0.0)
                parameter.fill_(0.0 if name.endswith("bias") else 1.0 - offset)
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


def read_model(
    directory: Path, name: str | None = None, max_len: int | None = None
) -> tuple[Family, DecoderConfig, ModelInfo]:
    """Family, shape and capabilities from the small files of a directory. max_len: see `load`. Raises ModelLoadError,
    also for a checkpoint that another program quantised."""
    fields = Fields(read_json(directory / "config.json"), str(directory / "config.json"))
    family = family_of(fields)
    quant_config(directory)
    with sums_of(fields.where):
        config = family.read(fields).within(max_len)
    _require_held(directory, config)
    config, headed = _with_own_head(directory, family, config)
    ids, passed = usable(read_ids(directory, fields, family, config.vocab_size), family, config.vocab_size)
    block = fields.get(family.block[0], int, family.block[1]) if family.block else None
    edit = fields.get(EDIT_FIELD, bool, False)
    info = describe(family.name, config, ids, name=name or directory.resolve().name, block=block, edit=edit)
    return family, config, replace(info, defaults=read_defaults(directory, info.kind), notes=(*headed, *passed))


def _require_held(directory: Path, config: DecoderConfig) -> None:
    """Raise ModelLoadError for a config that describes more weights than the files can hold, before anything of its
    size is made. Where there are no files the bounds of DecoderConfig have to do."""
    try:
        held = sum(file.stat().st_size for file in {entry.file for entry in inventory(directory).values()})
    except (CheckpointError, OSError):  # told where the weights are read
        return
    require_held(config, held, str(directory / "config.json"), str(directory))


def _with_own_head(directory: Path, family: Family, config: DecoderConfig) -> tuple[DecoderConfig, tuple[str, ...]]:
    """A config that says that head and embedding are one, but whose directory has a head with other numbers: the head
    counts, as it does in transformers 5, unless the family's own code has none then; a note says which. One with the
    same numbers is a copy."""
    embedding, head = (family.names.published(f"{own}.weight") for own in ("embed", "lm_head"))
    if not config.tied:
        return config, ()
    try:
        found = inventory(directory)
    except CheckpointError:  # told where the weights are read
        return config, ()
    if embedding not in found or head not in found or same_numbers(found[embedding], found[head]):
        return config, ()
    what = "it is used" if family.own_head else "it is not used, as in the original"
    note = f"config.json ties the head to the embedding, but {head} has other numbers than {embedding}: {what}."
    return replace(config, tied=not family.own_head), (note,)


def quant_config(directory: Path, found: Mapping[str, TensorEntry] | None = None) -> QuantConfig | Method | None:
    """How a checkpoint is quantised, None for a float one: by config.json, by a file that older programs write beside
    it, or, where `found` (its tensors) is given, by their names. Raises ModelLoadError for a method, or settings of
    one, that are not read, CheckpointError for tensors that need settings which are nowhere."""
    path = directory / "config.json"
    config = read_json(path)
    raw = config.get("quantization_config")
    if raw is None:
        raw = config.get("quantization")  # MLX's name for it
    if raw is not None:
        ours = isinstance(raw, Mapping) and raw.get("quant_method") == METHOD
        return QuantConfig.parse(raw, str(path)) if ours else by_config(raw, str(path))
    for name, method in ASIDE.items():
        if (directory / name).is_file():
            return by_config({"quant_method": method, **read_json(directory / name)}, str(directory / name))
    return None if found is None else by_names(found, directory)


def weights_in(found: Mapping[str, TensorEntry], config: QuantConfig | Method | None) -> dict[str, Stored]:
    """A directory's tensors as weights. Raises CheckpointError for parts of one that do not fit each other."""
    return stored(found) if config is None or isinstance(config, QuantConfig) else config.weights(found)


def quantisable(model: nn.Module) -> list[str]:
    """Names of the parameters that may be quantised: the matrices of linear layers and the embedding. Norms and biases
    are small; a router decides between nearly equal experts."""
    kinds = (nn.Linear, nn.Embedding)
    return [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, kinds)]


def compare(
    family: Family, model: nn.Module, found: Mapping[str, Stored], config: QuantConfig | Method | None = None
) -> list[str]:
    """What keeps these tensors from being this model's parameters: missing, unexpected, mis-shaped, of an unknown
    dtype, quantised where they should not be; one sentence each. Empty: it fits."""
    problems = []
    wanted = {family.names.published(own): parameter for own, parameter in model.named_parameters()}
    may_be = {family.names.published(own) for own in quantisable(model)}
    for name, parameter in wanted.items():
        shape = tuple(parameter.shape)
        if name not in found:
            problems.append(f"missing tensor {name}, wanted {list(shape)}")
            continue
        weight = found[name]
        if weight.shape != shape:
            problems.append(f"tensor {name} has shape {list(weight.shape)}, wanted {list(shape)}")
        elif weight.kind is None and weight.parts[name].dtype not in DTYPES:
            problems.append(f"tensor {name} has dtype {weight.parts[name].dtype}, wanted one of {', '.join(DTYPES)}")
        elif weight.foreign:
            continue  # of any matrix; floats are made of one that is never quantised here
        elif weight.kind is not None and (config is None or name not in may_be):
            why = "config.json has no quantization_config" if config is None else "this one is never quantised"
            problems.append(f"tensor {name} is quantised ({weight.kind}), but {why}")
        elif weight.kind is not None and isinstance(config, QuantConfig) and weight.kind not in _kinds(config):
            says = f"{config.format} (head {config.head})"
            problems.append(f"tensor {name} is quantised as {weight.kind}, but config.json says {says}")
    tied = family.names.published("lm_head.weight")
    for name in sorted(found.keys() - wanted.keys()):
        if name == tied or any(re.fullmatch(pattern, name) for pattern in family.harmless):
            continue  # a tied head is often written all the same; the embedding is what counts
        if isinstance(config, Method) and _of_zeros(name, found):
            continue
        problems.append(f"unexpected tensor {name} {list(found[name].shape)}{_beyond(family, name)}")
    return problems


def _of_zeros(name: str, found: Mapping[str, Stored]) -> bool:
    """Whether this is a bias of zeros beside a matrix that another program quantised: AutoGPTQ writes them for layers
    that have none."""
    matrix = found.get(f"{name.removesuffix('.bias')}.weight")
    if not name.endswith(".bias") or matrix is None or not matrix.foreign:
        return False
    entry = found[name].parts[name]
    fits = entry.dtype in DTYPES and entry.shape == matrix.shape[:1]
    return fits and not bool(read_tensor(entry, name).any())


def _kinds(config: QuantConfig) -> set[str]:
    return {FORMATS[name].kind for name in (config.format, config.head) if name in FORMATS}


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
    max_len: int | None = None,
) -> Decoder:
    """A model from a Hugging Face directory, its parameters without gradient. dtype None: the dtype most of its weights
    are stored in; float32 for a quantised checkpoint, whose weights are expanded (`assemble` keeps them packed). edit:
    whether it was trained to overwrite committed tokens (LLaDA2.1); None: as config.json says. max_len: the longest
    context it will be used for, None: its own; it chooses between the factors of longrope (wirings.phi3).

    Raises ModelLoadError for an unreadable config, an unsupported family or an unknown device; CheckpointError listing
    every missing, unexpected or mis-shaped tensor, or naming the corrupt file.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise ModelLoadError(f"{directory} is not a model directory.", hint="Give a directory that has a config.json.")
    family, config, info = read_model(directory, name, max_len)
    if edit is not None:
        info = replace(info, edit=edit)
    found = inventory(directory)
    chosen = stored_dtype(found, quant_config(directory, found)) if dtype is None else named_dtype(dtype)
    model = skeleton(config, info, chosen)
    return fill(model, read_weights(directory, family, model), device)


def fill(
    model: Decoder, parts: Iterable[tuple[str, QTensor | torch.Tensor]], device: str | torch.device = "cpu"
) -> Decoder:
    """A skeleton with these values for its parameters, without gradient; quantised ones are expanded. Raises
    ModelLoadError for an unknown device."""
    place = _device(device)
    for own, weight in parts:
        module, _, leaf = own.rpartition(".")
        parent = model.get_submodule(module)
        value = weight.dequantise() if isinstance(weight, QTensor) else weight
        setattr(parent, leaf, nn.Parameter(value.to(device=place, dtype=getattr(parent, leaf).dtype)))
    return model.requires_grad_(False)


def read_weights(directory: Path, family: Family, model: Decoder) -> Iterator[tuple[str, QTensor | torch.Tensor]]:
    """(own parameter name, weight) of every parameter of `model` (a skeleton will do), read when its turn comes; those
    of a turned checkpoint turned back, as floats. Raises CheckpointError before the first one if the directory's
    tensors are not the model's."""
    parts = read_stored(directory, family, model, exact=True)
    basis = basis_in(directory, model)
    return parts if basis is None else basis.undone(parts)


def basis_in(directory: Path, model: Decoder) -> Basis | None:
    """What the matrices of a directory are turned to; None: nothing. model: a skeleton will do."""
    config = quant_config(directory)
    if not isinstance(config, QuantConfig) or config.rotation is None:
        return None
    rotation = config.rotation
    return basis_of(model.program, model.info.name, tied=model.config.tied, seed=rotation.seed, block=rotation.block)


def read_stored(
    directory: Path, family: Family, model: Decoder, *, exact: bool = False, notes: list[str] | None = None
) -> Iterator[tuple[str, QTensor | torch.Tensor]]:
    """As `read_weights`, but as they lie in the files. A turned checkpoint has a head beside the embedding: `model` is
    then one that is not tied. exact: weights that another program quantised as floats, as its own dequantisation gives
    them; else in the packed format that holds them. notes: gains a sentence for each of these that is not held
    exactly."""
    found = inventory(directory)
    config = quant_config(directory, found)
    weights = weights_in(found, config)
    problems = compare(family, model, weights, config)
    if problems:
        raise CheckpointError(f"{directory} does not fit family {family.name}: {listed(problems)}")
    packable = set(quantisable(model))
    for own, _ in model.named_parameters():
        name = family.names.published(own)
        weight = weights[name]
        if weight.opened is None:
            yield own, read_one(name, weight)
            continue
        value, note = weight.opened(exact or own not in packable)
        if note is not None and notes is not None:
            notes.append(f"{own}: {note}")
        yield own, value


def listed(problems: list[str], most: int = 12) -> str:
    """The first problems as the end of a sentence, and how many more there are."""
    more = f"; and {len(problems) - most} more" if len(problems) > most else ""
    return "; ".join(problems[:most]) + more + "."


def named_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A torch dtype from its name. Raises ValidationError for a name that is not float32, bfloat16 or float16."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in NAMED:
        raise ValidationError(f"dtype must be {', '.join(NAMED)}, got {dtype!r}.", param="dtype")
    return NAMED[dtype]


def stored_dtype(found: Mapping[str, TensorEntry], config: QuantConfig | Method | None = None) -> torch.dtype:
    """The dtype that most weights of a checkpoint are stored in (of one that another program quantised: of what it left
    in float); float32 if none is a known one, or if its matrices are quantised by `dfastllm quantize`."""
    elements = dict.fromkeys(DTYPES, 0)
    for entry in found.values():
        if entry.dtype in elements and not isinstance(config, QuantConfig):
            elements[entry.dtype] += entry.size
    return DTYPES[max(elements, key=lambda dtype: elements[dtype])]


def _device(wanted: str | torch.device) -> torch.device:
    try:
        return torch.empty(0, device=wanted).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ModelLoadError(f"device {str(wanted)!r} cannot be used here: {reason}", param="device") from error


def save(model: Decoder, path: str | Path, *, files: Iterable[str | Path] = (), shard_bytes: int = 5 * 10**9) -> Path:
    """Write config.json, generation_config.json where the model has defaults of its own, and the weights under their
    published names; `files` (tokenizer files, a model card) are copied beside them. More than `shard_bytes` of weights
    are split into shards with an index. Every file appears whole or not at all, so saving over the directory a model
    was loaded from is safe. Returns the directory."""
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    family = find_family(model.info.family)
    config = config_json(model)
    tensors = {
        family.names.published(own): parameter.detach().to("cpu").contiguous()
        for own, parameter in model.named_parameters()
    }
    shards = cut_shards({name: tensor.nbytes for name, tensor in tensors.items()}, shard_bytes)
    for file, names in shards.items():
        with _replacing(directory / file) as temporary:
            save_file({name: tensors[name] for name in names}, temporary, metadata={"format": "pt"})
    where = {name: file for file, names in shards.items() for name in names}
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        _write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": where})
    _drop_stale(directory, set(shards))
    (directory / BIGRAM_FILE).unlink(missing_ok=True)  # learned for the drafts of the weights that were here
    _write_json(directory / "config.json", config)
    if model.info.defaults:
        _write_json(directory / "generation_config.json", generation_config(model.info.defaults))
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


@contextmanager
def _replacing(path: Path) -> Iterator[str]:
    """A temporary path beside `path` that takes its place when the block ends well and vanishes when it does not."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        yield temporary
    except BaseException:
        os.unlink(temporary)
        raise
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)
