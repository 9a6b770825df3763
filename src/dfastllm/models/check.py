"""Would this checkpoint load, and why not: all that `load` would refuse, found from headers, no weights read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dfastllm.core import ModelInfo
from dfastllm.errors import DFastLLMError, ModelLoadError, UnsupportedError
from dfastllm.models.checkpoint import (
    basis_in,
    compare,
    named_dtype,
    quant_config,
    read_model,
    skeleton,
    stored_dtype,
    weights_in,
)
from dfastllm.models.decoder import Decoder
from dfastllm.models.family import Family
from dfastllm.models.gguf.load import open_gguf
from dfastllm.models.headers import TensorEntry, inventory
from dfastllm.models.ids import ordinary_tokens
from dfastllm.quant.checkpoint import QuantConfig, Stored
from dfastllm.quant.gguf.types import FLOATS

__all__ = ["CheckReport", "Problem", "check"]


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason why a checkpoint would not load or not serve right. `code` is the code of the error `load` (or the
    tokenizer) would raise: model_load_failed, bad_checkpoint, bad_tokenizer or unsupported."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What a directory or GGUF file holds. Fields are None where a problem keeps them from being known.

    weight_bytes: memory of the parameters at `dtype`, of quantised ones as stored; kv_bytes_per_token: K,V of all
    layers at `dtype`. notes: oddities that do not keep it from loading. quantised: config.json's format, or the type
    that most of a GGUF file's parameters have (gguf-q4_k); None for a float checkpoint.
    """

    path: Path
    problems: tuple[Problem, ...]
    notes: tuple[str, ...] = ()
    info: ModelInfo | None = None
    dtype: str | None = None
    parameters: int | None = None
    weight_bytes: int | None = None
    kv_bytes_per_token: int | None = None
    tensors: int | None = None
    files: int | None = None
    quantised: str | None = None

    @property
    def ok(self) -> bool:
        return not self.problems

    def memory_bytes(self, tokens: int) -> int | None:
        """Weights and the K,V of this many tokens; activations come on top."""
        if self.weight_bytes is None or self.kv_bytes_per_token is None:
            return None
        return self.weight_bytes + tokens * self.kv_bytes_per_token

    def __str__(self) -> str:
        lines = [f"{self.path}: {'would load' if self.ok else 'would not load'}"]
        if self.info is not None:
            lines.append(f"  family {self.info.family}, kind {self.info.kind}, context {self.info.max_len} tokens")
        if self.parameters is not None and self.weight_bytes is not None and self.kv_bytes_per_token is not None:
            lines.append(
                f"  {self.parameters:,} parameters, {self.weight_bytes / 2**20:,.1f} MiB at {self.dtype}; "
                f"K,V {self.kv_bytes_per_token / 1024:,.2f} KiB per token"
            )
        lines += [f"  problem ({problem.code}): {problem.message}" for problem in self.problems]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def check(path: str | Path, *, dtype: torch.dtype | str | None = None) -> CheckReport:
    """Look at a Hugging Face directory or a GGUF file as loading it with this dtype would, and report instead of
    raising.

    Raises ValidationError only for a dtype that is none of float32, bfloat16, float16.
    """
    directory = Path(path)
    wanted = None if dtype is None else named_dtype(dtype)
    if directory.is_file():
        return _check_gguf(directory, torch.bfloat16 if wanted is None else wanted)
    if not directory.is_dir():
        return CheckReport(
            directory, (Problem(ModelLoadError.code, f"{directory} is neither a directory nor a file."),)
        )
    problems: list[Problem] = []
    found: dict[str, TensorEntry] | None = None
    described = None
    try:
        found = inventory(directory)
    except ModelLoadError as error:
        problems.append(Problem(error.code, error.message))
    try:
        described = read_model(directory)
    except ModelLoadError as error:
        problems.append(Problem(error.code, error.message))
    tensors = None if found is None else len(found)
    files = None if found is None else len({entry.file for entry in found.values()})
    if described is None:
        return CheckReport(directory, tuple(problems), tensors=tensors, files=files)

    family, config, info = described
    quantised = None
    try:
        quantised = quant_config(directory, found)
    except ModelLoadError as error:  # tensors of a method that needs settings; what config.json says was read above
        problems.append(Problem(error.code, error.message))
    chosen = wanted or stored_dtype(found or {}, quantised)
    if isinstance(quantised, QuantConfig) and quantised.rotation is not None:
        config = replace(config, tied=False)
    model = skeleton(config, info, chosen)
    weights: dict[str, Stored] = {}
    if found is not None:
        try:
            weights = weights_in(found, quantised)
        except ModelLoadError as error:
            problems.append(Problem(error.code, error.message))
        else:
            different = compare(family, model, weights, quantised)
            problems += [Problem("bad_checkpoint", f"{message}.") for message in different]
    try:
        basis_in(directory, model)
    except UnsupportedError as error:
        problems.append(Problem(error.code, error.message))
    problems += _tokenizer_problems(directory, config.vocab_size)
    return CheckReport(
        directory,
        tuple(problems),
        notes=tuple(_notes(directory, info)),
        info=info,
        dtype=str(chosen).removeprefix("torch."),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        weight_bytes=_weight_bytes(model, family, weights),
        kv_bytes_per_token=_kv_bytes(model, chosen),
        tensors=tensors,
        files=files,
        quantised=None if quantised is None else quantised.label,
    )


def _check_gguf(path: Path, dtype: torch.dtype) -> CheckReport:
    try:
        opened = open_gguf(path)
    except DFastLLMError as error:
        return CheckReport(path, (Problem(error.code, error.message),), files=1)
    with opened:
        model = skeleton(opened.config, opened.info, dtype)
        parameters = dict(model.named_parameters())
        sizes: Counter[str] = Counter()
        held = 0
        for own, source in opened.sources.items():
            size, tensor = parameters[own].numel(), source.tensor
            sizes[tensor.type.name] += size
            widened = tensor.type.name == "F16" or len(tensor.shape) == 1
            held += 4 * size if widened else tensor.nbytes * (source.stop - source.start) // tensor.shape[0]
        kind = sizes.most_common(1)[0][0]
        return CheckReport(
            path,
            (),
            notes=tuple(_of_model(opened.info)),
            info=opened.info,
            dtype=str(dtype).removeprefix("torch."),
            parameters=sizes.total(),
            weight_bytes=held,
            kv_bytes_per_token=_kv_bytes(model, dtype),
            tensors=len(opened.file.tensors),
            files=1,
            quantised=None if kind in FLOATS else f"gguf-{kind.lower()}",
        )


def _weight_bytes(model: Decoder, family: Family, weights: dict[str, Stored]) -> int:
    total = 0
    for own, parameter in model.named_parameters():
        weight = weights.get(family.names.published(own))
        packed = weight is not None and weight.kind is not None
        total += weight.nbytes if weight is not None and packed else parameter.nbytes
    return total


def _kv_bytes(model: Decoder, dtype: torch.dtype) -> int:
    config = model.config
    return 2 * config.layers * config.kv_heads * config.head_dim * dtype.itemsize


def _tokenizer_problems(directory: Path, rows: int) -> list[Problem]:
    """A tokenizer that can give ids without an embedding row is another model's."""
    try:
        size = ordinary_tokens(directory)
    except ModelLoadError as error:
        return [Problem(error.code, error.message)]
    if size is None or size <= rows:
        return []
    return [
        Problem(
            "bad_tokenizer",
            f"wrong tokenizer: tokenizer.json has ids up to {size - 1}, the model has {rows} embedding rows "
            f"(ids up to {rows - 1}).",
        )
    ]


def _notes(directory: Path, info: ModelInfo) -> list[str]:
    notes = []
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "merges.txt")):
        notes.append("no tokenizer.json: the model takes token ids only.")
    return notes + _of_model(info)


def _of_model(info: ModelInfo) -> list[str]:
    notes = list(info.notes)
    return notes if info.eos_ids else [*notes, "no end-of-text id known: texts end only at their token limit."]
