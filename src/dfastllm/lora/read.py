"""Reading an adapter from a directory as PEFT writes it: adapter_config.json and adapter_model.safetensors.

Everything that can be checked before a tensor is read is checked from the header alone: names, shapes, ranks, bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from io import RawIOBase
from pathlib import Path
from typing import BinaryIO, Protocol, cast

import torch
from torch import Tensor

from dfastllm.core import value
from dfastllm.errors import AdapterError, CheckpointError
from dfastllm.lora.adapter import EMBED, HEAD, Adapter, Delta
from dfastllm.lora.config import CONFIG_FILE, LoraConfig, read_config
from dfastllm.lora.deltas import Parts, build
from dfastllm.lora.keys import EXPERTS, Key, experts_of, finite, parse_key
from dfastllm.quant.header import TensorEntry, header_of
from dfastllm.quant.stream import read_tensor

__all__ = ["MAX_RANK", "WEIGHTS_FILE", "Base", "read_adapter", "weights_of"]

WEIGHTS_FILE = "adapter_model.safetensors"
MAX_RANK = 512
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
MAX_TENSORS = 1 << 17  # A, B of the seven linears of 128 experts in 60 layers are 50,000


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


@value(frozen=True, slots=True)
class Entry:
    """A tensor of the file, by its header."""

    key: Key
    where: TensorEntry

    @property
    def shape(self) -> tuple[int, ...]:
        return self.where.shape

    @property
    def dtype(self) -> str:
        return self.where.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def read_adapter(path: str | Path, base: Base, *, max_rank: int = MAX_RANK, max_bytes: int | None = None) -> Adapter:
    """The adapter of a PEFT directory, for this base. max_rank: of any of its matrices. max_bytes: of its tensors.

    Raises AdapterError, which names the file, the tensor or the key: no directory, no adapter_config.json, pickled
    weights, a key that asks for other mathematics, a tensor of another base, of a wrong shape or rank, or with NaN or
    infinity, too many bytes.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise AdapterError(f"{directory} is not a directory.", hint=f"Give the directory that has {CONFIG_FILE}.")
    before = _stamps(directory)
    config = read_config(directory)
    path = weights_of(directory)
    where = str(path)
    try:
        # Neither mapped nor opened twice: somebody may write the file, or put another in its place, while it is read.
        with path.open("rb", buffering=0) as file:
            entries = _entries(header_of(cast(BinaryIO, file), path), where)
            modules = _modules(entries, base, where)
            for own, found in modules.items():
                _check(own, found, config, base, max_rank, where)
            total = sum(entry.nbytes for entry in entries)
            if max_bytes is not None and total > max_bytes:
                raise AdapterError(
                    f"{where} has {total} bytes of tensors, wanted at most {max_bytes}.",
                    hint="Raise the memory that adapters may take.",
                )
            deltas, notes = _deltas(file, modules, config, base, where)
    except (CheckpointError, OSError) as error:
        said = error.message if isinstance(error, CheckpointError) else f"{where} cannot be read: {error}."
        raise AdapterError(said, hint="The file is damaged or incomplete.") from error
    if _stamps(directory) != before:
        raise AdapterError(f"{directory} was changed while it was read.", hint="Load it again when it is written.")
    if not deltas:
        raise AdapterError(f"{where} holds no adapter: none of its tensors changes the model.")
    return Adapter.of(deltas, notes)


def _stamps(directory: Path) -> list[tuple[int, ...]]:
    """What changes when one of the two files is written or takes another's place."""
    found: list[tuple[int, ...]] = []
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        try:
            about = (directory / name).stat()
            found.append((about.st_ino, about.st_size, about.st_mtime_ns))
        except OSError:
            found.append(())
    return found


def weights_of(directory: Path) -> Path:
    """The weights of a directory. Raises AdapterError where they are pickled, or there are none."""
    file = directory / WEIGHTS_FILE
    if file.is_file():
        return file
    pickled = sorted(path.name for path in directory.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl"))
    if pickled:
        raise AdapterError(
            f"{directory} has its weights in {', '.join(pickled)}: a pickle, which can run any code when it is "
            "read, so it is not.",
            hint=f"Save it as {WEIGHTS_FILE}: load it with PEFT, then save_pretrained(..., safe_serialization=True).",
        )
    raise AdapterError(f"{WEIGHTS_FILE} is missing in {directory}.")


def _entries(header: Mapping[str, TensorEntry], where: str) -> list[Entry]:
    """The header of the file. Raises AdapterError for a tensor that is no part of an adapter."""
    if len(header) > MAX_TENSORS:
        raise AdapterError(f"{where} has {len(header)} tensors, wanted at most {MAX_TENSORS}.")
    found = []
    for name, at in sorted(header.items()):
        entry = Entry(parse_key(name, where), at)
        if entry.dtype not in DTYPES:
            raise AdapterError(
                f"{where}: tensor {name} has dtype {entry.dtype}, wanted one of {', '.join(DTYPES)}.", param=name
            )
        found.append(entry)
    return found


Module = dict[str, Entry]  # part -> its tensor


def _modules(entries: list[Entry], base: Base, where: str) -> dict[str, Module]:
    """Own matrix name -> its parts. The experts of a layer as one parameter go by "<own name of the mixture>.experts"
    and which of the two parameters it is. Raises AdapterError for a module that the base has not."""
    found: dict[str, Module] = {}
    by_module: dict[str, Module] = {}
    for entry in entries:
        by_module.setdefault(entry.key.module, {})[entry.key.part] = entry
    for module, parts in by_module.items():
        own = _experts(module, parts, base, where) if EXPERTS.fullmatch(module) else _own(module, base, where)
        for part, entry in parts.items():
            if part in found.setdefault(own, {}):
                raise AdapterError(f"{where}: {entry.key.name} and {found[own][part].key.name} are of one matrix.")
            found[own][part] = entry
    return found


def _own(module: str, base: Base, where: str) -> str:
    try:
        own = base.own(f"{module}.weight").removesuffix(".weight")
    except KeyError:
        own = ""
    if f"{own}.weight" not in base.shapes and not (own == HEAD and base.tied):
        raise AdapterError(
            f"{where}: {base.name} has no module {module}: the adapter is for another model.",
            param=module,
            hint="Its base is named in adapter_config.json, as base_model_name_or_path.",
        )
    return own


def _experts(module: str, parts: Module, base: Base, where: str) -> str:
    """The name of one of the two parameters of a layer's experts, which their adapters' names do not tell apart: by the
    shapes of A and B."""
    match = EXPERTS.fullmatch(module)
    assert match is not None
    first = _own(f"{match[1]}.0.down_proj", base, where)
    hidden, inner = base.shapes[f"{first}.weight"]
    experts = first.removesuffix(".0.down_proj")
    sizes = {"down_proj": (inner, hidden), "gate_up_proj": (hidden, 2 * inner)}
    if set(parts) == {"a", "b"}:
        for name, (inputs, outputs) in sizes.items():
            if parts["a"].shape[-1:] == (inputs,) and parts["b"].shape[:1] == (outputs,):
                return f"{experts}.{name}"
    shown = {part: list(entry.shape) for part, entry in parts.items()}
    raise AdapterError(f"{where}: {module} has {shown}, wanted A and B of gate_up_proj or of down_proj.", param=module)


def _fused(own: str) -> bool:
    """Whether a name is that of a parameter which holds all experts of a layer."""
    return own.endswith((".experts.down_proj", ".experts.gate_up_proj"))


def _size(own: str, base: Base) -> tuple[int, int]:
    """[out, in] of a matrix by own name."""
    if own == HEAD and base.tied:
        own = EMBED
    if not _fused(own):
        out, inputs = base.shapes[f"{own}.weight"]
        return out, inputs
    experts, _, name = own.rpartition(".")
    hidden, inner = base.shapes[f"{experts}.0.down_proj.weight"]
    return (hidden, inner) if name == "down_proj" else (2 * inner, hidden)


def _check(own: str, parts: Module, config: LoraConfig, base: Base, max_rank: int, where: str) -> None:
    """Raises AdapterError for what of a module's parts does not fit the config or the base."""
    out, inputs = _size(own, base)
    low, high = ("embed_a", "embed_b") if own == EMBED else ("a", "b")
    module = next(iter(parts.values())).key.module
    experts = _count(own, base) if _fused(own) else 1
    if (low in parts) != (high in parts):
        raise AdapterError(f"{where}: {module} has one of A and B alone.", param=module)
    rank = config.rank_of(module) if low in parts else 0
    if rank > max_rank:
        raise AdapterError(
            f"{where}: {module} has rank {rank}, wanted at most {max_rank}.", param=module, hint="See max_lora_rank."
        )
    vocab = own in (EMBED, HEAD)  # which may have been resized
    wanted: dict[str, tuple[int, ...]] = {
        "a": (rank * experts, inputs),
        "b": (out, rank * experts),
        "b_bias": (out,),
        "embed_a": (rank, out),
        "embed_b": (inputs, rank),
        "magnitude": (inputs if own == EMBED else out,),
        "bias": (out,),
        "full": (out, inputs),
        "base": (out, inputs),
    }
    for part, entry in parts.items():
        if part in ("full", "base") and not vocab:
            raise AdapterError(
                f"{where}: {entry.key.name} is a whole matrix; only the embedding's and the head's may be replaced.",
                param=entry.key.name,
                hint="Train without it in modules_to_save.",
            )
        asked = part in (low, high) or {
            "b_bias": config.lora_bias,
            "magnitude": config.magnitudes and rank > 0,
            "bias": config.bias != "none" and f"{own}.bias" in base.shapes and not own.endswith(".router"),
            "full": True,
            "base": rank > 0,
        }.get(part, False)
        if not asked:
            raise AdapterError(f"{where}: {entry.key.name} is not what {CONFIG_FILE} and the base ask for.")
        if not _fits(entry.shape, wanted[part], out if vocab else None):
            raise AdapterError(
                f"{where}: {entry.key.name} has shape {list(entry.shape)}, wanted {list(wanted[part])}.",
                param=entry.key.name,
                hint=f"The base here is {base.name}; the rank of the module is {rank} by {CONFIG_FILE}.",
            )
    if config.magnitudes and rank and not _fused(own) and "magnitude" not in parts:
        raise AdapterError(f"{where}: {module} lacks its magnitude vector, and use_dora is set.", param=module)


def _fits(shape: tuple[int, ...], wanted: tuple[int, ...], vocab: int | None) -> bool:
    """Whether a shape is the wanted one; a size that is the vocabulary's may be any."""
    pairs = zip(shape, wanted, strict=False)
    return len(shape) == len(wanted) and all(a == b or (b == vocab and a > 0) for a, b in pairs)


def _count(own: str, base: Base) -> int:
    """Experts of a layer, by the name of one of the parameters that hold them all."""
    start = own.rpartition(".")[0] + "."
    return sum(name.startswith(start) and name.endswith(".down_proj.weight") for name in base.shapes)


def _deltas(
    file: RawIOBase, modules: Mapping[str, Module], config: LoraConfig, base: Base, where: str
) -> tuple[dict[str, Delta], tuple[str, ...]]:
    """The deltas by own name, and what was left out on the way."""
    notes: list[str] = []
    deltas: dict[str, Delta] = {}
    for own, entries in modules.items():
        scale = config.scale_of(next(iter(entries.values())).key.module)
        parts: Parts = {
            part: finite(entry.key.name, read_tensor(entry.where, entry.key.name, file), where)
            for part, entry in entries.items()
        }
        if _fused(own):
            deltas |= _of_experts(own, parts, scale, base)
        elif (delta := build(own, parts, scale, base, notes)) is not None:
            deltas[own] = delta
    if config.tied and base.tied and EMBED in deltas and HEAD not in deltas:
        deltas[HEAD] = _of_head(deltas[EMBED])
    return deltas, tuple(notes)


def _of_experts(own: str, parts: Parts, scale: float, base: Base) -> dict[str, Delta]:
    """The deltas of each expert's own matrices."""
    experts, _, name = own.rpartition(".")
    found = {}
    for i, (a, b) in enumerate(experts_of(parts["a"], parts["b"], _count(own, base))):
        halves = (
            {"down_proj": b} if name == "down_proj" else dict(zip(("gate_proj", "up_proj"), b.chunk(2), strict=True))
        )
        for matrix, rows in halves.items():
            found[f"{experts}.{i}.{matrix}"] = Delta.of(a, rows.T, scale)
    return found


def _of_head(embed: Delta) -> Delta:
    """The embedding's delta for the head that shares its matrix: (B A) transposed."""
    if embed.factor is not None:
        raise AdapterError("a DoRA adapter of an embedding cannot be tied to the head.", param="ensure_weight_tying")
    if embed.a is None or embed.b is None:
        return embed
    return Delta.of(embed.natural_b, embed.a, embed.scale, full=embed.full)
