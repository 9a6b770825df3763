"""A GGUF file as a model: its shape, capabilities and parameters. Decides from metadata and tensor shapes, before any
weight is read; parameters are then converted one at a time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dfastllm.core import ModelInfo
from dfastllm.errors import CheckpointError, ModelLoadError, ValidationError
from dfastllm.kernels.packed import QTensor
from dfastllm.models.checkpoint import listed, skeleton
from dfastllm.models.config import DecoderConfig, require_held
from dfastllm.models.family import Family, Fields, Gguf, Ids, describe, family_of_gguf, sums_of
from dfastllm.models.gguf.names import HARMLESS, SAMPLING, SETTINGS, row_order, separate
from dfastllm.models.gguf.rope import read_scaling
from dfastllm.models.ids import usable, with_fallbacks
from dfastllm.models.program import offsets
from dfastllm.options import generation_defaults
from dfastllm.quant.gguf import GgufFile, GgufTensor, special_ids, to_float, to_qtensor
from dfastllm.quant.gguf.memory import return_freed

__all__ = ["GgufModel", "Source", "open_gguf"]

RETURN_EVERY = 1 << 26  # bytes of the file converted between two times that freed memory is given back
MASK = "mask_token_id"
# Settings that only have one value here.
_ONLY = {
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "use_parallel_residual": False,
    "pooling_type": 0,
    "expert_shared_count": 0,
}


@dataclass(frozen=True, slots=True)
class Source:
    """Where a parameter comes from: rows [start, stop) of a tensor, in this order of those rows (None: as they are),
    less what the file has added to it."""

    tensor: GgufTensor
    start: int
    stop: int
    order: Tensor | None
    added: float = 0.0


class GgufModel:
    """An open GGUF model. config, info: as `models.load` gives them; architecture: llama.cpp's name; sources: own
    parameter name -> Source, exactly the parameters of the Decoder with this config.

    Use it as a context manager or call `close`; `file.metadata` has everything the file says (text.gguf makes the
    tokenizer of it).
    """

    def __init__(
        self, file: GgufFile, architecture: str, config: DecoderConfig, info: ModelInfo, sources: dict[str, Source]
    ) -> None:
        self.file = file
        self.architecture = architecture
        self.config = config
        self.info = info
        self.sources = sources

    def tensors(self) -> Iterator[tuple[str, QTensor | Tensor, str | None]]:
        """(own parameter name, value, note) one by one: matrices as QTensor, vectors as float32. note: what changed
        where the format of the file is not held exactly. A tensor's pages leave resident memory once it is converted.
        What the caller frees between two of them is given back to the system now and then, and at the end. Raises
        CheckpointError for weights that are NaN or infinite."""
        since = 0
        for name, source in self.sources.items():
            yield name, *self.read(source)
            since += source.tensor.nbytes
            if since >= RETURN_EVERY:
                return_freed()
                since = 0
        return_freed()

    def read(self, source: Source) -> tuple[QTensor | Tensor, str | None]:
        """One parameter, its rows in this decoder's order; see `tensors`."""
        whole = (source.start, source.stop) == (0, source.tensor.shape[0])
        if len(source.tensor.shape) == 1:
            vector = to_float(self.file, source.tensor)[source.start : source.stop]
            return (vector if source.order is None else vector[source.order]).contiguous() - source.added, None
        value, note = to_qtensor(self.file, source.tensor)
        if not whole:
            value = value.rows(slice(source.start, source.stop))
        return value if source.order is None else value.rows(source.order), note

    def close(self) -> None:
        """Unmap the file; what conversion freed goes back to the system."""
        self.file.close()
        return_freed()

    def __del__(self) -> None:
        if hasattr(self, "file"):  # a model that was never made has nothing to close
            self.close()

    def __enter__(self) -> GgufModel:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def open_gguf(path: str | Path, *, name: str | None = None, max_len: int | None = None) -> GgufModel:
    """Read the header and match it with a decoder. name: the model's name; None: general.name, else the file's stem.
    max_len: see `checkpoint.load`.

    Raises ModelLoadError for an architecture, setting or expert count that is not supported, CheckpointError listing
    missing, unexpected or mis-shaped tensors and for a damaged file, TokenizerError for ids outside the vocabulary.
    """
    file = GgufFile.open(path)
    try:
        return _match(file, name, max_len)
    except ValidationError as error:  # a shape that no decoder can have
        file.close()
        raise ModelLoadError(f"{file.path}: {error}", param=error.param) from error
    except Exception:
        file.close()
        raise


def _match(file: GgufFile, name: str | None, max_len: int | None) -> GgufModel:
    fields = Fields(_plain(file.metadata), str(file.path))
    family, gguf = family_of_gguf(fields.get("general.architecture", str), str(file.path))
    _refuse(fields, gguf, family)
    with sums_of(str(file.path)):
        config = _config(file, fields, gguf).within(max_len)
    require_held(config, file.nbytes, "its metadata", str(file.path))
    sources = _sources(file, family, gguf, config)
    title = name or fields.get("general.name", str, file.path.stem)
    ids, notes = _ids(file, family, config)
    info = describe(family.name, config, ids, name=title)
    given = {option: fields.raw.get(key) for option, key in SAMPLING.items()}
    info = replace(info, defaults=generation_defaults(given), notes=notes)
    return GgufModel(file, gguf.arch, config, info, sources)


def _plain(metadata: dict[str, Any]) -> dict[str, Any]:
    """Arrays of one number repeated (head counts per layer) as that number; other arrays as lists."""

    def plain(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            same = len(value) > 0 and bool((value == value[0]).all())
            return value[0].item() if same else value.tolist()
        return value

    return {key: plain(value) for key, value in metadata.items() if not key.startswith("tokenizer.")}


def _refuse(fields: Fields, gguf: Gguf, family: Family) -> None:
    neutral = {"logits_factor": (0.0, 1.0), "embed_factor": (0.0, 1.0), "residual_factor": (0.0, 1.0)}
    settings = {key: neutral.get(field, 0) for key, field in SETTINGS.items() if field not in gguf.fields}
    fields.only(**{f"{gguf.arch}.{key}": values for key, values in {**_ONLY, **settings}.items()})
    causal = (True,) if family.kind == "ar" else (False,)
    fields.only(**{f"{gguf.arch}.attention.causal": causal, "diffusion.shift_logits": bool(family.shift)})


def _config(file: GgufFile, fields: Fields, gguf: Gguf) -> DecoderConfig:
    arch = gguf.arch

    def number(key: str, default: int | None = None) -> int:
        return fields.get(f"{arch}.{key}", int, default)

    hidden, heads = number("embedding_length"), number("attention.head_count")
    dim = number("attention.key_length", hidden // max(heads, 1))
    rotary = number("rope.dimension_count", dim)
    if "rope_dim" not in gguf.fields:
        fields.only(**{f"{arch}.rope.dimension_count": dim})
    fields.only(**{f"{arch}.attention.value_length": dim})
    context = number("context_length")
    theta = fields.get(f"{arch}.rope.freq_base", float, 10000.0)
    scaling = read_scaling(fields, arch, context, theta, _factors(file, rotary // 2))
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{file.path}: tensor 'token_embd.weight' is missing or no matrix.")
    has = file.tensors.__contains__
    moe = "moe" in gguf.fields
    config = DecoderConfig(
        vocab_size=embedding.shape[0],
        hidden_size=hidden,
        intermediate_size=number("feed_forward_length", number("expert_feed_forward_length") if moe else None),
        layers=number("block_count"),
        heads=heads,
        kv_heads=number("attention.head_count_kv", heads),
        head_dim=dim,
        max_len=context if scaling is None else scaling.stretched(context),
        rope_theta=theta,
        rope_dim=0 if rotary == dim else rotary,
        rope_scaling=scaling,
        norm_eps=fields.get(f"{arch}.attention.layer_norm_rms_epsilon", float),
        qkv_bias=has("blk.0.attn_q.bias") or has("blk.0.attn_qkv.bias"),
        out_bias=has("blk.0.attn_output.bias"),
        mlp_bias=has("blk.0.ffn_gate.bias"),
        qk_norm=has("blk.0.attn_q_norm.weight"),
        tied=not has("output.weight"),
    )
    kinds = {"window": int}
    said: dict[str, Any] = {
        field: fields.get(f"{arch}.{key}", kinds.get(field, float))
        for key, field in SETTINGS.items()
        if field in gguf.fields and field != "moe" and fields.raw.get(f"{arch}.{key}")
    }
    bare = {key.removeprefix(f"{arch}."): value for key, value in fields.raw.items()}
    return gguf.read(Fields(bare, fields.where), replace(config, **said))


def _factors(file: GgufFile, half: int) -> dict[str, Tensor]:
    """Tensors of rotary factors by name, which lie in the file once or (also) in its first layer."""
    found = {}
    for published, tensor in file.tensors.items():
        match = re.fullmatch(r"(?:blk\.0\.)?(rope_(?:freqs|factors_long|factors_short))\.weight", published)
        if match:
            if tensor.shape != (half,):
                raise CheckpointError(f"{file.path}: {published!r} has shape {list(tensor.shape)}, wanted [{half}].")
            found[match[1]] = to_float(file, tensor)
    return found


def _sources(file: GgufFile, family: Family, gguf: Gguf, config: DecoderConfig) -> dict[str, Source]:
    """Every parameter of the decoder's tree with its place in the file. Raises CheckpointError listing what does not
    fit."""
    # The smallest ModelInfo will do: the tree depends on the config alone.
    info = ModelInfo("", family.name, "ar", config.vocab_size, config.max_len, config.layers, 1, 1, ())
    added = offsets(family.program(config))
    problems: list[str] = []
    sources: dict[str, Source] = {}
    used: set[str] = set()
    for own, parameter in skeleton(config, info, torch.float32).named_parameters():
        shape = tuple(parameter.shape)
        published, start, tensor_shape = _place(file, own, shape, config, gguf)
        tensor = file.tensors.get(published)
        if tensor is None:
            problems.append(f"missing tensor {published}, wanted {list(shape)}")
        elif tensor.shape != tensor_shape:
            problems.append(f"tensor {published} has shape {list(tensor.shape)}, wanted {list(tensor_shape)}")
        else:
            used.add(published)
            if len(tensor.shape) == 3:  # the experts of a layer, end to end
                size = tensor.nbytes // tensor.shape[0]
                tensor = replace(tensor, shape=shape, offset=tensor.offset + start * size, nbytes=size)
                start = 0
            order = row_order(own, config, gguf, separate)
            sources[own] = Source(tensor, start, start + shape[0], order, added.get(own, 0.0))
    for found in sorted(file.tensors.keys() - used):
        if not any(re.fullmatch(pattern, found) for pattern in HARMLESS):
            problems.append(f"unexpected tensor {found} {list(file.tensors[found].shape)}")
    if problems:
        raise CheckpointError(f"{file.path} does not fit architecture {gguf.arch}: {listed(problems)}")
    return sources


def _place(
    file: GgufFile, own: str, shape: tuple[int, ...], config: DecoderConfig, gguf: Gguf
) -> tuple[str, int, tuple[int, ...]]:
    """(tensor's name, first row or expert, the tensor's whole shape): its own tensor, rows of a fused attn_qkv, or one
    of the experts."""
    module, _, leaf = own.rpartition(".")
    published = gguf.names.published(own)
    expert = re.search(r"\.experts\.(\d+)\.", own)
    if expert and config.moe is not None:
        return published, int(expert[1]), (config.moe.experts, *shape)
    if not re.search(r"attn\.[qkv]_proj$", module):
        return published, 0, shape
    fused = f"{gguf.names.published(module[:-6] + 'qkv_proj')}.{leaf}"
    if fused not in file.tensors:
        return published, 0, shape
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    start = {"q": 0, "k": q, "v": q + kv}[module[-6]]
    return fused, start, (q + 2 * kv, *shape[1:])


def _ids(file: GgufFile, family: Family, config: DecoderConfig) -> tuple[Ids, tuple[str, ...]]:
    """The file's ids, the family's published ones where it says nothing (and they are inside the vocabulary), and a
    note for each that is passed over. Raises ModelLoadError for a mask past the vocabulary of a model that needs it."""
    known = special_ids(file.metadata, config.vocab_size)
    tokens = file.metadata.get("tokenizer.ggml.tokens", [])
    mask = known.mask
    said = file.metadata.get(f"tokenizer.ggml.{MASK}")
    if mask is None and said is not None and family.kind != "ar":
        raise ModelLoadError(f"{file.path}: {MASK} is {said}, past the vocabulary of {config.vocab_size}.", param=MASK)
    if mask is None:
        mask = next((tokens.index(text) for text in family.mask_tokens if text in tokens), None)
    found = Ids(eos=known.ends, mask=mask, bos=known.bos, pad=known.pad)
    found, notes = usable(with_fallbacks(found, family.ids, config.vocab_size), family, config.vocab_size)
    return found, (*known.notes, *notes)
