"""A model and an adapter into one model: a Hugging Face directory that any program reads, without LoRA."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from dfastllm import assemble
from dfastllm.convert.source import files_for_other_weights
from dfastllm.errors import UnsupportedError, ValidationError
from dfastllm.lora import EMBED, HEAD, Adapter, read_adapter
from dfastllm.lora.merge import merged, merged_bias
from dfastllm.models import Decoder, adapter_base, build, load, save
from dfastllm.models.checkpoint import named_dtype
from dfastllm.quant.partial import storing

__all__ = ["merge", "with_adapter"]


def with_adapter(model: Decoder, adapter: Adapter) -> Decoder:
    """A model that computes what `model` does with the adapter, in its dtype; `model` is unchanged. A head that is tied
    to the embedding gets a matrix of its own where the adapter changes either. Raises UnsupportedError, naming the
    matrix, for a bias that the model's family cannot write."""
    config = model.config
    if config.tied and not {EMBED, HEAD}.isdisjoint(adapter.deltas):
        config = dataclasses.replace(config, tied=False)
    whole = build(config, model.info, dtype=model.dtype)
    values = dict(model.named_parameters())
    if model.config.tied and not config.tied:
        values[f"{HEAD}.weight"] = values[f"{EMBED}.weight"]
    places = dict(whole.named_parameters())
    with torch.no_grad():
        for name, parameter in places.items():
            parameter.copy_(values[name])
        for name, delta in adapter.deltas.items():
            weight, bias = places.get(f"{name}.weight"), places.get(f"{name}.bias")
            changed = merged_bias(delta, values.get(f"{name}.bias"))
            if weight is None or (bias is None and changed is not None):
                what = "matrix" if weight is None else "bias"
                raise UnsupportedError(f"{model.info.name} has no {what} of its own for {name}.", param="adapter")
            weight.copy_(merged(name, delta, values[f"{name}.weight"]))
            if bias is not None and changed is not None:
                bias.copy_(changed)
    return whole.requires_grad_(False)


def merge(model: Path, adapter: Path, out: Path, *, dtype: str | None = None, force: bool = False) -> Path:
    """Write the model at a path with the adapter of a directory merged into it to `out`, in `dtype` (None: as stored; a
    quantised model as bfloat16), its tokenizer, template and ends of text beside it. force: over what is there.
    Returns `out`. Raises what loading both raises, UnsupportedError for what cannot be merged, ValidationError,
    StorageError."""
    if dtype is not None:
        named_dtype(dtype)
    if assemble.is_gguf(model):
        raise UnsupportedError(
            "a GGUF file is not merged into: its tokenizer cannot be written as a Hugging Face one.",
            param="model",
            hint="Serve it with the adapter, or merge into the checkpoint that it was made from.",
        )
    if out.resolve() == model.resolve() or (out.exists() and any(out.iterdir()) and not force):
        raise ValidationError(f"{out} is not empty.", param="out", hint="Give a new directory, or --force.")
    files = files_for_other_weights(model)
    base = load(model, dtype=dtype)
    whole = with_adapter(base, read_adapter(adapter, adapter_base(base)))
    with storing(out, sum(parameter.nbytes for parameter in whole.parameters())):
        save(whole, out, files=files)
    return out
