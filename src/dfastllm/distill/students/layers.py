"""A student by layer dropping: some of a model's layers, its embedding, final norm and head, as a model of their own.

What is dropped adds nothing any more, so the student is worse than its source until it is trained, and much better to
begin with than random weights (DistilBERT takes every second layer, Sanh et al. 2019, arXiv 1910.01108; the first and
the last matter most, Men et al. 2024, arXiv 2403.03853). Width, vocabulary, tokenizer and chat template are the
source's, so that its distributions can be compared with the student's, and so that the student can draft for it.

`python -m dfastllm.distill.students.layers SOURCE OUT [--layers 15 | --keep 0,4,9 | --share 0.5]`
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from dfastllm.assemble import is_gguf
from dfastllm.convert.source import files_for_other_weights
from dfastllm.core import ModelInfo
from dfastllm.errors import DFastLLMError, ValidationError
from dfastllm.kernels.packed import QTensor
from dfastllm.llm import resolve
from dfastllm.models import Decoder, DecoderConfig, save
from dfastllm.models.checkpoint import (
    fill,
    named_dtype,
    quant_config,
    read_model,
    read_weights,
    skeleton,
    stored_dtype,
)
from dfastllm.models.family import find_family, require_expressible
from dfastllm.models.gguf import open_gguf
from dfastllm.models.headers import inventory
from dfastllm.options import generation_config
from dfastllm.text import Tokenizer
from dfastllm.text.gguf import read_tokenizer
from dfastllm.text.saving import save_tokenizer

__all__ = ["Student", "config_of", "evenly", "make_student", "most_layers", "renamed", "small_files", "tokenizer_of"]

SHARE = 0.5  # of the source's parameters, where nothing else was asked for


@dataclass(frozen=True, slots=True)
class Student:
    """What was made.

    path        the directory.
    kept        numbers of the source's layers, ascending.
    layers      of the source.
    parameters  of the student; a tied embedding counts once.
    source      parameters of the source.
    """

    path: Path
    kept: tuple[int, ...]
    layers: int
    parameters: int
    source: int

    @property
    def share(self) -> float:
        """Parameters of the student over those of its source."""
        return self.parameters / self.source


def evenly(layers: int, count: int) -> tuple[int, ...]:
    """`count` of the numbers 0 to layers - 1, ascending: the first, the last, and those between in even steps (a half
    rounds up). Raises ValidationError unless 1 <= count <= layers."""
    if not 1 <= count <= layers:
        raise ValidationError(f"layers must be in [1, {layers}], as the source has; got {count}.", param="layers")
    if count == 1:
        return (0,)
    steps = count - 1
    return tuple((2 * i * (layers - 1) + steps) // (2 * steps) for i in range(count))


def config_of(config: DecoderConfig, keep: Sequence[int]) -> DecoderConfig:
    """The shape of a model of these layers. What a config says of each layer (window, rotary positions, mixture of
    experts) goes with the layer. Raises ValidationError for numbers that are none, not ascending or not there."""
    kept = tuple(keep)
    ascending = all(a < b for a, b in pairwise(kept))
    if not kept or not ascending or kept[0] < 0 or kept[-1] >= config.layers:
        raise ValidationError(
            f"keep must be ascending numbers of layers, each in [0, {config.layers - 1}]; got {list(kept)}.",
            param="keep",
        )
    windowed = tuple(config.is_windowed(i) for i in kept)
    ropeless = tuple(not config.rotates(i) for i in kept)
    mixtures = tuple(config.is_mixture(i) for i in kept)
    moe = None if config.moe is None else replace(config.moe, layers=() if all(mixtures) else mixtures)
    return replace(
        config,
        layers=len(kept),
        window=config.window if any(windowed) else 0,
        windowed=() if all(windowed) or not any(windowed) else windowed,
        local_theta=config.local_theta if any(windowed) else 0.0,
        ropeless=ropeless if any(ropeless) else (),
        moe=moe,
    )


def most_layers(config: DecoderConfig, info: ModelInfo, share: float) -> tuple[int, ...]:
    """As many layers, evenly chosen, as leave at most this share of the source's parameters, embedding and head
    included. Raises ValidationError for a share outside (0, 1], or one below what a single layer leaves."""
    if not 0 < share <= 1:
        raise ValidationError(f"share must be in (0, 1], got {share}.", param="share")
    beside, of_layer = _sizes(config, info)
    whole = beside + sum(of_layer)
    for count in range(config.layers, 0, -1):
        kept = evenly(config.layers, count)
        if beside + sum(of_layer[i] for i in kept) <= share * whole:
            return kept
    raise ValidationError(
        f"no student of {info.name} has {share:.1%} of its parameters: embedding, head and one layer are "
        f"{(beside + of_layer[0]) / whole:.1%}.",
        param="share",
        hint="Layer dropping keeps the vocabulary; ask for a larger share.",
    )


def make_student(
    source: str | Path,
    out: str | Path,
    *,
    layers: int | None = None,
    keep: Sequence[int] | None = None,
    share: float | None = None,
    dtype: str | None = None,
    force: bool = False,
) -> Student:
    """Write a student of a shipped model, a Hugging Face directory or a GGUF file as a Hugging Face directory, with the
    source's tokenizer and chat template. One tensor at a time is read, and no dropped one kept.

    layers, keep, share: how many layers (see `evenly`), which, or as many as this share of the parameters allows; at
    most one of them, none: half the parameters. dtype: of the weights; None: as stored, float32 of quantised ones,
    which are expanded. force: write over a model that is in `out`.

    Raises ValidationError for what cannot be (a family whose config.json cannot say the result among it), and what
    loading raises.
    """
    path, place = resolve(source), Path(out)
    if sum(choice is not None for choice in (layers, keep, share)) > 1:
        raise ValidationError("give one of layers, keep and share.", param="layers")
    if place.resolve() == path.resolve():
        raise ValidationError(f"{place} is the source; name another directory.", param="out")
    if not force and (place / "config.json").exists():
        raise ValidationError(f"{place} holds a model.", param="out", hint="Give --force to write over it.")
    with ExitStack() as opened:
        if is_gguf(path):
            gguf = opened.enter_context(open_gguf(path))
            config, info, chosen = gguf.config, gguf.info, torch.float32
            parts: Iterable[tuple[str, QTensor | Tensor]] = ((own, value) for own, value, _ in gguf.tensors())
        else:
            family, config, info = read_model(path)
            tensors = inventory(path)
            chosen = stored_dtype(tensors, quant_config(path, tensors))
            parts = read_weights(path, family, skeleton(config, info, torch.float32))
        if keep is None:
            found = (
                most_layers(config, info, SHARE if share is None else share)
                if layers is None
                else evenly(config.layers, layers)
            )
        else:
            found = tuple(keep)
        model = _filled(config, info, found, parts, chosen if dtype is None else named_dtype(dtype), place.name)
        save(model, place, files=small_files(path, Path(opened.enter_context(tempfile.TemporaryDirectory()))))
    _write_card(place, info.name, found, config.layers)
    beside, of_layer = _sizes(config, info)
    parameters = beside + sum(of_layer[i] for i in found)
    return Student(place, found, config.layers, parameters, beside + sum(of_layer))


def _filled(
    config: DecoderConfig,
    info: ModelInfo,
    keep: Sequence[int],
    parts: Iterable[tuple[str, QTensor | Tensor]],
    dtype: torch.dtype,
    name: str,
) -> Decoder:
    """The student with its weights."""
    shape = config_of(config, keep)
    family = find_family(info.family)
    try:
        require_expressible(family, shape)
    except ValidationError as error:
        raise ValidationError(
            f"layers {list(keep)} of {info.name}: {error}",
            param="keep",
            hint="Keep layers in the pattern that the family has.",
        ) from error
    model = skeleton(shape, replace(info, name=name, layers=shape.layers), dtype)
    return fill(model, renamed(parts, keep))


def renamed(
    parts: Iterable[tuple[str, QTensor | Tensor]], keep: Sequence[int]
) -> Iterator[tuple[str, QTensor | Tensor]]:
    """The parameters that stay, under their names in the student (own names: layers.N.rest, and those of no layer)."""
    place = {old: new for new, old in enumerate(keep)}
    for own, value in parts:
        if not own.startswith("layers."):
            yield own, value
            continue
        _, number, rest = own.split(".", 2)
        if int(number) in place:
            yield f"layers.{place[int(number)]}.{rest}", value


def _sizes(config: DecoderConfig, info: ModelInfo) -> tuple[int, list[int]]:
    """Parameters outside of the layers, and of each layer."""
    beside, of_layer = 0, [0] * config.layers
    for own, parameter in skeleton(config, info, torch.float32).named_parameters():
        if own.startswith("layers."):
            of_layer[int(own.split(".", 2)[1])] += parameter.numel()
        else:
            beside += parameter.numel()
    return beside, of_layer


def small_files(path: Path, into: Path) -> list[Path]:
    """What belongs beside the weights of a model that is made of another: tokenizer, chat template, ends of text,
    terms; not its card. Those of a GGUF file are written `into` a directory first."""
    if not is_gguf(path):
        return files_for_other_weights(path)
    with open_gguf(path) as gguf:
        files = save_tokenizer(read_tokenizer(gguf.file.metadata), into)
        generation = {**generation_config(gguf.info.defaults), "eos_token_id": list(gguf.info.eos_ids)}
    generation_file = into / "generation_config.json"
    generation_file.write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    return [*files, generation_file]


def tokenizer_of(name: str | Path) -> Tokenizer:
    """The tokenizer of a model in any form. Raises TokenizerError."""
    path = resolve(name)
    if not is_gguf(path):
        return Tokenizer.load(path)
    with open_gguf(path) as gguf:
        return read_tokenizer(gguf.file.metadata)


def _write_card(place: Path, source: str, kept: Sequence[int], layers: int) -> None:
    numbers = ", ".join(map(str, kept))
    (place / "README.md").write_text(
        f"# {place.name}\n\nLayers {numbers} of the {layers} of {source}, with its embedding, head and tokenizer. Not "
        f"trained yet: it is a beginning for distillation. The terms of {source} hold for it.\n",
        encoding="utf-8",
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dfastllm.distill.students.layers", description="A student by layer dropping."
    )
    parser.add_argument("source", help="a shipped model's name, a Hugging Face directory or a GGUF file")
    parser.add_argument("out", type=Path, help="the student's directory")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--layers", type=int, help="how many: the first, the last, and those between in even steps")
    which.add_argument("--keep", help="which, as numbers with commas between them, from 0")
    which.add_argument("--share", type=float, help=f"at most this share of the source's parameters (default {SHARE})")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; default: as stored, float32 of quantised ones")
    parser.add_argument("--force", action="store_true", help="write over a model that is in OUT")
    args = parser.parse_args(argv)
    try:
        made = make_student(
            args.source,
            args.out,
            layers=args.layers,
            keep=None if args.keep is None else _numbers(args.keep),
            share=args.share,
            dtype=args.dtype,
            force=args.force,
        )
    except DFastLLMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"{made.path}: layers {', '.join(map(str, made.kept))} of {made.layers}; {made.parameters / 1e6:.2f} M of "
        f"{made.source / 1e6:.2f} M parameters ({made.share:.1%})"
    )
    return 0


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ValidationError(
            f"keep must be numbers with commas between them, such as 0,4,9; got {text!r}.", param="keep"
        ) from None


if __name__ == "__main__":
    raise SystemExit(main())
