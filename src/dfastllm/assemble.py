"""From a path to a model that can serve: the one place where read > quantise > pack meet. Models know none of it.

On a CPU a model becomes a `PackedDecoder` (kernels of our own, quantised or not), on a GPU with Triton a
`DeviceDecoder`; on another device, or where asked, it stays the plain torch `Decoder`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dfastllm.core import ModelInfo
from dfastllm.core.filetype import is_gguf
from dfastllm.errors import UnsupportedError, ValidationError
from dfastllm.kernels.extension import native
from dfastllm.kernels.packed import QTensor
from dfastllm.kernels.triton.memory import named_device, out_of_memory
from dfastllm.kernels.triton.ops import triton_problem
from dfastllm.models import Decoder, DecoderConfig, DeviceDecoder, PackedDecoder, device_decoder, pack_decoder
from dfastllm.models import load as load_decoder
from dfastllm.models.basis import Basis, basis_of, format_for
from dfastllm.models.bigram import Bigram, read_bigram
from dfastllm.models.checkpoint import (
    basis_in,
    fill,
    named_dtype,
    quant_config,
    quantisable,
    read_model,
    read_stored,
    skeleton,
    stored_dtype,
)
from dfastllm.models.gguf import GgufModel, open_gguf
from dfastllm.models.headers import inventory
from dfastllm.models.shortlist import read_shortlist
from dfastllm.quant import FORMATS, quantise
from dfastllm.quant.formats import EIGHT_BITS, require_format
from dfastllm.quant.gguf.memory import return_freed
from dfastllm.text import Tokenizer
from dfastllm.text.gguf import read_tokenizer

__all__ = ["BACKENDS", "Backend", "Loaded", "dequantised", "is_gguf", "load", "model_info", "pack", "place"]

Backend = Literal["auto", "native", "torch", "triton"]
BACKENDS = ("auto", "native", "torch", "triton")
FP8 = "fp8"
OLDEST_FP8 = (8, 9)  # compute capability of the first cards whose products take float8_e4m3fn


@dataclass(frozen=True)
class Loaded:
    """A model with the tokenizer that came with it, and the bigram head that one has which drafts blocks."""

    model: Decoder | PackedDecoder | DeviceDecoder
    tokenizer: Tokenizer
    bigram: Bigram | None = None


@dataclass(frozen=True)
class _Source:
    """A checkpoint of either kind, not yet read. parts: (own parameter name, value), read when its turn comes; notes
    gains a sentence for each weight that is not kept as stored. basis: what the parts are turned to already."""

    config: DecoderConfig
    info: ModelInfo
    dtype: torch.dtype
    quantised: bool
    parts: Iterator[tuple[str, QTensor | Tensor]]
    notes: list[str]
    basis: Basis | None = None


def load(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    quantization: str | None = None,
    backend: Backend = "auto",
    name: str | None = None,
    max_len: int | None = None,
    drafting: bool = False,
    invariant: bool = False,
) -> Loaded:
    """A model and its tokenizer from a Hugging Face directory or a GGUF file.

    dtype: what floating-point weights are held in, None: as stored (float16, which CPUs compute poorly, as float32).
    quantization: quantise floating-point matrices while loading, to w8, w8g, w6, w4m or w4. w8r, w8gr and w4r: all
        matrices, those of a quantised file too, of the model in another basis (`models.basis`). 8bit: w8r, or w8g where
        the model has no such basis. fp8: float8_e4m3fn with a scale a row, of the layers' matrices, on a GPU.
    backend: native: packed weights and our kernels on a CPU; triton: our kernels on a GPU; torch: the plain model;
        auto: one of the first two where it can be.
    max_len: the longest context that will be served, None: the model's own. It chooses between the factors of longrope.
    drafting: it writes drafts for another model. So packed weights of an autoregressive one get a head of the tokens of
        its shortlist alone where the directory has one (`models.shortlist`; the plain torch model says them all), and
        with a masked one comes its bigram head, where it has one (`models.bigram`).
    invariant: products on a GPU whose bits of a row do not depend on the rows beside it (`--batch-invariant`).

    Raises ModelLoadError, CheckpointError, TokenizerError, ValidationError for an unknown name, UnsupportedError for
    what cannot go together.
    """
    if backend not in BACKENDS:
        raise ValidationError(f"backend must be {', '.join(BACKENDS)}, got {backend!r}.", param="backend")
    if dtype is not None:
        named_dtype(dtype)
    if quantization is not None:
        require_format(quantization, (*FORMATS, EIGHT_BITS, FP8), "quantization")
    path, place = Path(path), named_device(device)
    if is_gguf(path):
        with open_gguf(path, name=name, max_len=max_len) as gguf:
            tokenizer = read_tokenizer(gguf.file.metadata)
            gguf.info = _noting(gguf.info, tokenizer)
            elsewhere = backend == "torch" or place.type != "cpu"
            expandable = elsewhere and quantization is None and gguf.config.moe is not None
            form = _form(place, backend, quantised=not expandable, fp8=quantization == FP8)
            if form == "torch":
                return Loaded(_expanded(gguf, device, dtype), tokenizer)
            source = _from_gguf(gguf, dtype)
            return Loaded(_served(source, form, place, dtype, quantization, invariant=invariant), tokenizer)
    _, _, info = read_model(path, name, max_len)
    tokenizer = Tokenizer.load(path)
    notes = _noting(info, tokenizer).notes
    quantised = quantization is not None or quant_config(path, inventory(path)) is not None
    bigram = read_bigram(path, info.vocab_size) if drafting and info.kind != "ar" else None
    form = _form(place, backend, quantised=quantised, fp8=quantization == FP8)
    if form != "torch":
        shortlist = read_shortlist(path, info.vocab_size) if drafting and info.kind == "ar" else None
        given = _from_directory(path, dtype, name, max_len)
        model: Decoder | PackedDecoder | DeviceDecoder = _served(
            given, form, place, dtype, quantization, shortlist, invariant=invariant
        )
        notes = (*notes, *_summed(given.notes))
    else:
        model = load_decoder(path, device=device, dtype=dtype, name=name, max_len=max_len)
    model.info = replace(model.info, notes=notes)
    return Loaded(model, tokenizer, bigram)


def _summed(notes: Sequence[str]) -> list[str]:
    """Notes of matrices, in a line for each kind: how many there are, and the one that says the largest number."""
    kinds: dict[str, list[str]] = {}
    for note in notes:
        own, _, text = note.partition(": ")
        if own.endswith(".weight"):
            kinds.setdefault(text.partition(" at most ")[0], []).append(text)

    def moved(text: str) -> float:
        found = re.search(r" at most ([0-9.e-]+)", text)
        return float(found[1]) if found else 0.0

    return [f"{len(texts)} matrices: {max(texts, key=moved)}" for texts in kinds.values()]


def _noting(info: ModelInfo, tokenizer: Tokenizer) -> ModelInfo:
    """With the notes of the tokenizer. Raises TokenizerError where it cannot be this model's."""
    fits = tokenizer.check_fits(info.vocab_size, info.mask_id)
    return replace(info, notes=tuple(dict.fromkeys((*info.notes, *tokenizer.notes, *fits))))


def dequantised(path: str | Path, dtype: torch.dtype | str | None = None) -> Loaded:
    """The plain torch model of a GGUF file, its weights as floats of `dtype` (None: bfloat16): what its quantised forms
    are measured against. Raises ModelLoadError, CheckpointError and TokenizerError as `load` does."""
    with open_gguf(Path(path)) as gguf:
        return Loaded(_expanded(gguf, "cpu", dtype), read_tokenizer(gguf.file.metadata))


def pack(model: Decoder, quantization: str | None = None) -> PackedDecoder:
    """The packed form of a built float model (random weights, a model just trained). The model itself is unchanged."""
    packed = _assemble(_built(model), quantization)
    packed.seed = model.seed
    return packed


def place(
    model: Decoder,
    quantization: str | None = None,
    *,
    device: str | torch.device = "cpu",
    invariant: bool = False,
) -> DeviceDecoder:
    """The form of a built float model that serves on a GPU, see `pack`. Raises UnsupportedError where it cannot."""
    where = torch.device(device)
    _form(where, "triton", quantised=quantization is not None, fp8=quantization == FP8)
    placed = _placed(_built(model), where, None, quantization, invariant=invariant)
    placed.seed = model.seed
    return placed


def _built(model: Decoder) -> _Source:
    parts = ((name, parameter.detach()) for name, parameter in model.named_parameters())
    return _Source(model.config, model.info, model.dtype, False, parts, [])


def model_info(path: str | Path, name: str | None = None) -> ModelInfo:
    """What a checkpoint can do, from its small parts alone. Raises ModelLoadError."""
    path = Path(path)
    if is_gguf(path):
        with open_gguf(path, name=name) as gguf:
            return gguf.info
    return read_model(path, name or path.name)[2]


def _expanded(gguf: GgufModel, device: str | torch.device, dtype: torch.dtype | str | None) -> Decoder:
    """The plain model of a GGUF file, its weights as floats of `dtype`, None: bfloat16."""
    model = skeleton(gguf.config, gguf.info, torch.bfloat16 if dtype is None else named_dtype(dtype))
    return fill(model, ((own, value) for own, value, _ in gguf.tensors()), device)


def _form(device: torch.device, backend: Backend, *, quantised: bool, fp8: bool = False) -> Backend:
    """Which form a model gets: native, triton or torch. Raises UnsupportedError where device or backend forbid what
    must be."""
    if backend == "triton" or (backend == "auto" and device.type == "cuda") or (fp8 and backend != "torch"):
        problem = triton_problem(device)
        if problem is None:
            if fp8:
                _require_fp8(device)
            return "triton"
        if backend == "triton" or fp8:
            what = "quantization fp8" if fp8 else "backend triton"
            raise UnsupportedError(
                f"{what} cannot be had: {problem}.",
                param="quantization" if fp8 else "backend",
                hint="Install triton beside torch's CUDA build and take device cuda, or leave it out.",
            )
    obstacle = None
    if device.type != "cpu":
        obstacle = ("device", f"on a CPU, not on {device}")
    elif backend == "torch":
        obstacle = ("backend", "with backend native or auto, not torch")
    if obstacle is None:
        return "native" if quantised or backend == "native" or native() is not None else "torch"
    param, serves = obstacle
    if quantised:
        hint = "Load a float checkpoint, without quantization."
        if device.type == "cuda" and backend == "auto":
            hint = f"Install triton for a GPU ({triton_problem(device)}), or load a float checkpoint."
        raise UnsupportedError(
            f"quantised weights are computed by the native backend, which serves {serves}.", param=param, hint=hint
        )
    if backend == "native":
        raise UnsupportedError(f"backend native serves {serves}.", param=param, hint="Use backend torch.")
    return "torch"


def _require_fp8(device: torch.device) -> None:
    """Raises UnsupportedError for a card that cannot multiply it."""
    if device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < OLDEST_FP8:
        name = torch.cuda.get_device_name(device)
        raise UnsupportedError(
            f"quantization fp8 needs a card of compute capability 8.9 or later; {name} has {found[0]}.{found[1]}.",
            param="quantization",
            hint="Take w8, or leave the weights as they are stored.",
        )


def _served(
    source: _Source,
    form: Backend,
    device: torch.device,
    dtype: torch.dtype | str | None,
    quantization: str | None,
    shortlist: Tensor | None = None,
    *,
    invariant: bool,
) -> PackedDecoder | DeviceDecoder:
    if form == "native":
        return _assemble(source, quantization, shortlist)
    chosen = None if dtype is None else named_dtype(dtype)
    with out_of_memory("loading the weights"):
        return _placed(source, device, chosen, quantization, shortlist, invariant=invariant)


def _from_directory(path: Path, dtype: torch.dtype | str | None, name: str | None, max_len: int | None) -> _Source:
    family, config, info = read_model(path, name, max_len)
    found = inventory(path)
    quantised = quant_config(path, found)
    stored = stored_dtype(found, quantised)
    chosen = stored if dtype is None else named_dtype(dtype)
    basis = basis_in(path, skeleton(config, info, chosen))
    held = config if basis is None else replace(config, tied=False)
    notes: list[str] = []
    parts = read_stored(path, family, skeleton(held, info, chosen), notes=notes)
    return _Source(config, info, chosen, quantised is not None, parts, notes, basis)


def _from_gguf(gguf: GgufModel, dtype: torch.dtype | str | None) -> _Source:
    notes: list[str] = []

    def parts() -> Iterator[tuple[str, QTensor | Tensor]]:
        for own, value, note in gguf.tensors():
            if note:
                notes.append(f"{own}: {note}")
            yield own, value

    chosen = torch.bfloat16 if dtype is None else named_dtype(dtype)
    return _Source(gguf.config, gguf.info, chosen, True, parts(), notes)


def _assemble(source: _Source, quantization: str | None, shortlist: Tensor | None = None) -> PackedDecoder:
    """Packs a source's weights, quantising float matrices first where asked, and all of them for a format that turns
    them."""
    dtype = source.dtype
    if dtype == torch.float16:
        dtype = torch.float32
        source.notes.append("float16 weights are held as float32: float16 products are slow on CPUs")
    parts, basis = _quantised(source, quantization, dtype)
    kv = torch.bfloat16 if source.quantised or quantization is not None else dtype
    packed = pack_decoder(source.config, source.info, parts, kv, notes=source.notes, shortlist=shortlist, basis=basis)
    return_freed()
    return packed


def _placed(
    source: _Source,
    device: torch.device,
    dtype: torch.dtype | None,
    quantization: str | None,
    shortlist: Tensor | None = None,
    *,
    invariant: bool,
) -> DeviceDecoder:
    """The same on a device. dtype: of activations and float matrices, None: of the source; beside quantised ones
    bfloat16, in which Triton's interpreter computes wrong products: there float32."""
    fp8 = quantization == FP8
    quantised = source.quantised or (quantization is not None and not fp8)
    usual = torch.float32 if device.type == "cpu" else torch.bfloat16
    chosen = dtype or (usual if quantised else source.dtype)
    parts, basis = _quantised(source, None if fp8 else quantization, chosen)
    made = device_decoder(
        source.config,
        source.info,
        parts,
        chosen,
        device,
        fp8=fp8,
        notes=source.notes,
        shortlist=shortlist,
        basis=basis,
        invariant=invariant,
    )
    return_freed()
    return made


def _quantised(
    source: _Source, quantization: str | None, dtype: torch.dtype
) -> tuple[Iterator[tuple[str, QTensor | Tensor]], Basis | None]:
    """A source's parameters, float matrices quantised where asked, other floats as `dtype`; and what they are turned
    to."""
    shapes = skeleton(replace(source.config, tied=False), source.info, torch.float32)
    matrices, program = set(quantisable(shapes)), shapes.program
    chosen = None if quantization is None else FORMATS[format_for(quantization, program, source.info.name)]
    basis, given = source.basis, source.parts
    if basis is None and chosen is not None and chosen.turned:
        basis = basis_of(program, source.info.name, tied=source.config.tied)
        given = basis.turned(given)

    def parts() -> Iterator[tuple[str, QTensor | Tensor]]:
        for own, value in given:
            if isinstance(value, QTensor) or own not in matrices:
                yield own, value
            elif chosen is not None:
                outer = own in ("embed.weight", "lm_head.weight")
                yield own, quantise(value, FORMATS[chosen.head] if outer and chosen.head else chosen, name=own)
            else:
                yield own, value.to(dtype if value.dtype != torch.float32 or not source.quantised else value.dtype)

    return parts(), basis
