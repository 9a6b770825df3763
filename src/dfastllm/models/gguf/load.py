"""A GGUF file as a model: its shape, capabilities and parameters. Decides from metadata and tensor shapes, before any
weight is read; parameters are then converted one at a time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dfastllm.core import ModelInfo
from dfastllm.errors import CheckpointError, ModelLoadError, ValidationError
from dfastllm.kernels.packed import QTensor
from dfastllm.models.checkpoint import skeleton
from dfastllm.models.config import DecoderConfig
from dfastllm.models.family import Family, Fields, Ids, describe, find_family
from dfastllm.models.gguf.names import FAMILY_OF, HARMLESS, INTERLEAVED, NAMES, separate
from dfastllm.models.gguf.rope import read_scaling, scaling_from_factors
from dfastllm.quant.gguf import GgufFile, GgufTensor, special_ids, to_float, to_qtensor
from dfastllm.quant.gguf.memory import return_freed

__all__ = ["GgufModel", "Source", "open_gguf"]

RETURN_EVERY = 1 << 26  # bytes of the file converted between two times that freed memory is given back
_EXPERTS = ("expert_count", "expert_used_count", "expert_shared_count")
_ONLY = {  # settings that change what is computed, with the values this decoder computes
    "attention.scale": 0.0,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "logit_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "use_parallel_residual": False,
    "pooling_type": 0,
}


@dataclass(frozen=True, slots=True)
class Source:
    """Where a parameter comes from: rows [start, stop) of a tensor, in this order of those rows (None: as they are)."""

    tensor: GgufTensor
    start: int
    stop: int
    order: Tensor | None


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
            return (vector if source.order is None else vector[source.order]).contiguous(), None
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

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_gguf(path: str | Path, *, name: str | None = None) -> GgufModel:
    """Read the header and match it with a decoder. name: the model's name; None: general.name, else the file's stem.

    Raises ModelLoadError for an architecture, setting or expert count that is not supported, CheckpointError listing
    missing, unexpected or mis-shaped tensors and for a damaged file, TokenizerError for ids outside the vocabulary.
    """
    file = GgufFile.open(path)
    try:
        return _match(file, name)
    except ValidationError as error:  # a shape that no decoder can have
        file.close()
        raise ModelLoadError(f"{file.path}: {error}", param=error.param) from error
    except Exception:
        file.close()
        raise


def _match(file: GgufFile, name: str | None) -> GgufModel:
    fields = Fields(_plain(file.metadata), str(file.path))
    arch = fields.get("general.architecture", str)
    if arch not in FAMILY_OF:
        raise ModelLoadError(
            f"{file.path}: GGUF architecture {arch!r} is not supported; supported: {', '.join(sorted(FAMILY_OF))}.",
            param="general.architecture",
        )
    family = find_family(FAMILY_OF[arch])
    _refuse(fields, arch, family)
    config = _config(file, fields, arch)
    sources = _sources(file, arch, config)
    title = name or fields.get("general.name", str, file.path.stem)
    info = describe(family.name, config, _ids(file, family, config), name=title)
    return GgufModel(file, arch, config, info, sources)


def _plain(metadata: dict[str, Any]) -> dict[str, Any]:
    """Arrays of one number repeated (head counts per layer) as that number; other arrays as lists."""

    def plain(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            same = len(value) > 0 and bool((value == value[0]).all())
            return value[0].item() if same else value.tolist()
        return value

    return {key: plain(value) for key, value in metadata.items() if not key.startswith("tokenizer.")}


def _refuse(fields: Fields, arch: str, family: Family) -> None:
    experts = next((key for key in _EXPERTS if fields.get(f"{arch}.{key}", int, 0)), None)
    if experts is not None:
        raise ModelLoadError(
            f"{fields.where}: {arch}.{experts} is {fields.raw[f'{arch}.{experts}']}: mixtures of experts are not read "
            "from GGUF.",
            hint="Load the safetensors checkpoint.",
            param=f"{arch}.{experts}",
        )
    fields.only(**{f"{arch}.{key}": values for key, values in _ONLY.items()})
    causal = (True,) if family.kind == "ar" else (False,)
    fields.only(**{f"{arch}.attention.causal": causal, "diffusion.shift_logits": bool(family.shift)})
    split = fields.get("split.count", int, 1)
    if split > 1:
        raise ModelLoadError(
            f"{fields.where} is one of {split} parts of a split GGUF file.",
            hint="Join the parts with llama.cpp's `llama-gguf-split --merge`.",
            param="split.count",
        )


def _config(file: GgufFile, fields: Fields, arch: str) -> DecoderConfig:
    def number(key: str, default: int | None = None) -> int:
        return fields.get(f"{arch}.{key}", int, default)

    hidden, heads = number("embedding_length"), number("attention.head_count")
    dim = number("attention.key_length", hidden // max(heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        fields.only(**{f"{arch}.{key}": dim})
    context = number("context_length")
    window = number("attention.sliding_window", 0)
    theta = fields.get(f"{arch}.rope.freq_base", float, 10000.0)
    scaling = read_scaling(fields, arch, context)
    factors = next((t for n, t in file.tensors.items() if re.fullmatch(r"(blk\.0\.)?rope_freqs\.weight", n)), None)
    if factors is not None:
        if factors.shape != (dim // 2,):
            raise CheckpointError(
                f"{file.path}: {factors.name!r} has shape {list(factors.shape)}, wanted [{dim // 2}]."
            )
        original = number("rope.scaling.original_context_length", context)
        found = scaling_from_factors(to_float(file, factors), theta, original)
        if found is not None and scaling is not None:
            raise ModelLoadError(f"{file.path}: both rope_freqs.weight and {scaling.kind} scaling; one is supported.")
        scaling = scaling or found
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{file.path}: tensor 'token_embd.weight' is missing or no matrix.")
    has = file.tensors.__contains__
    return DecoderConfig(
        vocab_size=embedding.shape[0],
        hidden_size=hidden,
        intermediate_size=number("feed_forward_length"),
        layers=number("block_count"),
        heads=heads,
        kv_heads=number("attention.head_count_kv", heads),
        head_dim=dim,
        # A window is honoured by limiting the context to it, as for safetensors checkpoints.
        max_len=min(context, window) if window > 0 else context,
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=fields.get(f"{arch}.attention.layer_norm_rms_epsilon", float),
        qkv_bias=has("blk.0.attn_q.bias") or has("blk.0.attn_qkv.bias"),
        out_bias=has("blk.0.attn_output.bias"),
        mlp_bias=has("blk.0.ffn_gate.bias"),
        qk_norm=has("blk.0.attn_q_norm.weight"),
        tied=not has("output.weight"),
    )


def _sources(file: GgufFile, arch: str, config: DecoderConfig) -> dict[str, Source]:
    """Every parameter of the decoder's tree with its place in the file. Raises CheckpointError listing what does not
    fit."""
    # The smallest ModelInfo will do: the tree depends on the config alone.
    info = ModelInfo("", arch, "ar", config.vocab_size, config.max_len, config.layers, 1, 1, ())
    problems: list[str] = []
    sources: dict[str, Source] = {}
    used: set[str] = set()
    for own, parameter in skeleton(config, info, torch.float32).named_parameters():
        shape = tuple(parameter.shape)
        published, start, tensor_shape = _place(file, own, shape, config)
        tensor = file.tensors.get(published)
        if tensor is None:
            problems.append(f"missing tensor {published}, wanted {list(shape)}")
        elif tensor.shape != tensor_shape:
            problems.append(f"tensor {published} has shape {list(tensor.shape)}, wanted {list(tensor_shape)}")
        else:
            used.add(published)
            order = _order(own, config) if arch in INTERLEAVED else None
            sources[own] = Source(tensor, start, start + shape[0], order)
    for found in sorted(file.tensors.keys() - used):
        if not any(re.fullmatch(pattern, found) for pattern in HARMLESS):
            problems.append(f"unexpected tensor {found} {list(file.tensors[found].shape)}")
    if problems:
        more = f"; and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise CheckpointError(f"{file.path} does not fit architecture {arch}: {'; '.join(problems[:12])}{more}.")
    return sources


def _place(file: GgufFile, own: str, shape: tuple[int, ...], config: DecoderConfig) -> tuple[str, int, tuple[int, ...]]:
    """(tensor's name, first row, the tensor's whole shape): its own tensor, or rows of a fused attn_qkv."""
    module, _, leaf = own.rpartition(".")
    fused = f"{NAMES.published(re.sub(r'[qkv]_proj$', 'qkv_proj', module))}.{leaf}"
    if not re.search(r"attn\.[qkv]_proj$", module) or fused not in file.tensors:
        return NAMES.published(own), 0, shape
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    start = {"q": 0, "k": q, "v": q + kv}[module[-6]]
    return fused, start, (q + 2 * kv, *shape[1:])


def _order(own: str, config: DecoderConfig) -> Tensor | None:
    if ".attn.q_proj." in own:
        return separate(config.heads, config.head_dim)
    if ".attn.k_proj." in own:
        return separate(config.kv_heads, config.head_dim)
    return None


def _ids(file: GgufFile, family: Family, config: DecoderConfig) -> Ids:
    """The file's ids, the family's published ones where it says nothing (and they are inside the vocabulary)."""
    known = special_ids(file.metadata, config.vocab_size)
    tokens = file.metadata.get("tokenizer.ggml.tokens", [])

    def inside(token: int | None) -> int | None:
        return token if token is not None and token < config.vocab_size else None

    mask = known.mask
    if mask is None and family.kind != "ar":
        mask = next((tokens.index(text) for text in family.mask_tokens if text in tokens), inside(family.ids.mask))
    return Ids(
        eos=known.ends or tuple(token for token in family.ids.eos if token < config.vocab_size),
        mask=mask,
        bos=known.bos if known.bos is not None else inside(family.ids.bos),
        pad=known.pad if known.pad is not None else inside(family.ids.pad),
    )
