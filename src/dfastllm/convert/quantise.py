"""`dfastllm quantize`: a float checkpoint or a GGUF file in, a quantised directory out, a tensor (with calibration: a
layer) at a time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dfastllm.convert.gguf_source import open_source
from dfastllm.convert.layers import walk
from dfastllm.convert.report import (
    Quality,
    Report,
    WeightReport,
    divergence,
    log_probabilities,
    mean_loss,
    weight_report,
)
from dfastllm.convert.samples import rows_of, task_examples
from dfastllm.convert.simulate import simulate
from dfastllm.convert.source import Source
from dfastllm.errors import ValidationError
from dfastllm.kernels.packed import QTensor
from dfastllm.models.basis import Basis, basis_of, format_for
from dfastllm.models.checkpoint import basis_in, read_model, read_stored, skeleton
from dfastllm.quant.calibrate import InputStatistics
from dfastllm.quant.checkpoint import QuantConfig, Rotation, plan, write
from dfastllm.quant.formats import (
    EIGHT_BITS,
    FORMATS,
    Format,
    find_format,
    quantise,
    require_divisible,
    require_format,
)
from dfastllm.quant.gptq import gptq
from dfastllm.quant.partial import place
from dfastllm.quant.stream import Planned, SafetensorsWriter
from dfastllm.train.data import Example
from dfastllm.train.texts import file_examples

__all__ = ["CALIBRATIONS", "Calibration", "Options", "Progress", "measure", "quantise_model", "quantised"]

Calibration = Literal["none", "aware", "gptq"]
CALIBRATIONS: tuple[Calibration, ...] = ("none", "aware", "gptq")
Progress = Callable[[int, int, str], None]  # (weights done, weights in all, name of the last)


@dataclass(frozen=True, slots=True)
class Options:
    """How to quantise.

    format: of the layers' matrices; 8bit: w8r, or w8g for a model that cannot be turned. head: of embedding and head,
    "float" keeps them; "": `format` where that has 8 bits, else w8g. calibration: none, aware (scales weighted by the
    squares of the inputs) or gptq; it runs on `samples` samples of the task mix's training split, or of `text` (a text
    or .jsonl file). act_order: see `quant.gptq`. search False: plain rounding to nearest, for comparison.
    """

    format: str = EIGHT_BITS
    head: str = ""
    calibration: Calibration = "none"
    text: Path | None = None
    samples: int = 128
    seed: int = 0
    act_order: bool = True
    search: bool = True

    def __post_init__(self) -> None:
        require_format(self.format, (*FORMATS, EIGHT_BITS))
        if self.head not in ("", "float"):
            find_format(self.head, "head")
        if self.calibration not in CALIBRATIONS:
            raise ValidationError(
                f"calibrate must be {', '.join(CALIBRATIONS)}, got {self.calibration!r}.", param="calibrate"
            )
        turned = self.format == EIGHT_BITS or FORMATS[self.format].turned
        if self.head in FORMATS and FORMATS[self.head].turned and not turned:
            raise ValidationError(
                f"head {self.head} is of a model in another basis, format {self.format} is not.", param="head"
            )
        if turned and self.calibration != "none":
            raise ValidationError(
                f"{self.format} is written without calibration, which is of the matrices of a model's own basis.",
                param="calibrate",
                hint="Take another format, or none: at 8 bits calibration changes next to nothing.",
            )
        if self.samples < 1:
            raise ValidationError(f"samples must be at least 1, got {self.samples}.", param="samples")
        if self.text is not None and self.calibration == "none":
            raise ValidationError("a calibration file is given, but calibrate is none.", param="calibration_file")

    @property
    def head_format(self) -> str:
        return self.head or FORMATS[self.format].head or self.format

    def settled(self, source: Source) -> Options:
        """The same with the format that 8bit stands for; see `models.basis.format_for`."""
        program = source.family.program(source.config)
        return replace(self, format=format_for(self.format, program, source.info.name))

    def of(self, name: str) -> Format | None:
        """The format of a matrix (own name); None: it stays as it is."""
        wanted = self.head_format if name in ("embed.weight", "lm_head.weight") else self.format
        return None if wanted == "float" else FORMATS[wanted]


def quantise_model(
    model: str | Path,
    out: str | Path,
    options: Options,
    *,
    force: bool = False,
    shard_bytes: int = 5 * 10**9,
    progress: Progress | None = None,
) -> Report:
    """Write a quantised checkpoint to `out` with a report beside it; returns the report. model: see `open_source`.

    Memory: the largest tensor and its rounding; with calibration one layer in float32 (and, for GPTQ, its gram
    matrices) and the hidden states of the samples. Raises ValidationError when `out` has files and `force` is not
    given, or is the source; UnsupportedError for matrices that the format's groups do not divide, or that a GGUF file
    has in fewer than 8 bits where the format has too (before anything is written); CheckpointError naming a tensor with
    NaN or infinity; StorageError where the disk has no room; and as loading and calibrating do.
    """
    begun = time.monotonic()
    directory = Path(out)
    source = open_source(model)
    _require_writable(directory, source, force)
    options = options.settled(source)
    basis = _basis(source, options)
    matrices = dict(source.matrices)
    if basis is not None and basis.tied:
        matrices["lm_head.weight"] = matrices["embed.weight"]
    for name, (_, k) in matrices.items():
        format = options.of(name)
        if format is not None:
            require_divisible(format, k, source.published(name))
            source.require_holds(format, name if name in source.shapes else "embed.weight")
    weights: list[WeightReport] = []
    with SafetensorsWriter(directory, _planned(source, matrices, options), shard_bytes=shard_bytes) as writer:
        for name, value, line in quantised(source, options, basis):
            published = source.published(name)
            if isinstance(value, QTensor):
                write(writer, published, value)
            else:
                writer.write(published, value)
            weights.append(line)
            if progress is not None:
                progress(len(weights), len(source.names), name)
    _write_small_files(directory, source, options, basis)
    after = sum(weight.nbytes for weight in weights)
    report = Report(
        source=source.info.name,
        out=directory.resolve().name,
        format=options.format,
        head=options.head_format,
        calibration=options.calibration,
        parameters=source.parameters,
        bytes_before=source.nbytes,
        bytes_after=after,
        bits_per_weight=8 * after / source.parameters,
        seconds=round(time.monotonic() - begun, 1),
        weights=tuple(weights),
    )
    report.write(directory)
    return report


def _require_writable(directory: Path, source: Source, force: bool) -> None:
    if directory.exists() and not directory.is_dir():
        raise ValidationError(f"{directory} is a file; wanted a directory to write to.", param="out")
    if directory.exists() and directory.samefile(source.directory):
        raise ValidationError(f"{directory} is the source itself; write elsewhere.", param="out")
    if not force and directory.exists() and any(directory.iterdir()):
        raise ValidationError(
            f"{directory} is not empty.", param="out", hint="Give --force to write over what is there, or another name."
        )


def _basis(source: Source, options: Options) -> Basis | None:
    """What the matrices are turned to before they are rounded. Raises UnsupportedError."""
    if not FORMATS[options.format].turned:
        return None
    return basis_of(source.family.program(source.config), source.info.name, tied=source.config.tied)


def _kept_dtype(source: Source, name: str, turned: bool) -> torch.dtype:
    """Of a parameter that is not rounded: as stored; of a turned model float32 for routers, which decide between nearly
    equal experts, and for biases, so that a file holds what loading would make."""
    wide = turned and name.endswith((".router.weight", ".bias"))
    return torch.float32 if wide else source.dtype(name)


def _planned(source: Source, matrices: Mapping[str, tuple[int, int]], options: Options) -> dict[str, Planned]:
    found: dict[str, Planned] = {}
    turned = FORMATS[options.format].turned
    for name in dict.fromkeys((*source.names, *matrices)):
        format = options.of(name) if name in matrices else None
        if format is None:
            known = name if name in source.shapes else "embed.weight"  # a tied head, turned
            dtype = _kept_dtype(source, known, turned)
            found[source.published(name)] = Planned(dtype, source.shapes[known])
        else:
            found |= plan(source.published(name), format, matrices[name])
    return found


def quantised(
    source: Source, options: Options, basis: Basis | None = None
) -> Iterator[tuple[str, QTensor | Tensor, WeightReport]]:
    """(own name, what is written, its report) of every parameter; of a basis those of the turned model."""
    if basis is not None:
        yield from _turned(source, options, basis)
        return
    reports: dict[str, WeightReport] = {}

    def one(name: str, weight: Tensor, statistics: InputStatistics | None) -> QTensor | Tensor:
        format = options.of(name) if name in source.matrices else None
        published = source.published(name)
        rows = statistics.rows if statistics is not None else 0
        if format is None:
            kept = source.tensor(name)
            reports[name] = weight_report(published, kept, kept, "float", kept.nbytes, rows)
            return kept
        found = _round(weight, format, options, statistics, published)
        nbytes = format.nbytes(*source.matrices[name])
        reports[name] = weight_report(published, weight, found, format.name, nbytes, rows)
        return found

    if options.calibration == "none":
        for name in source.names:
            yield name, one(name, source.tensor(name), None), reports.pop(name)
        return
    model = skeleton(source.config, source.info, torch.float32)
    for name, value in walk(
        source, rows_of(model, _examples(source, options)), one, gram=options.calibration == "gptq"
    ):
        if name not in reports:  # norms and biases pass by `one`
            one(name, value if isinstance(value, Tensor) else value.codes, None)
        yield name, value, reports.pop(name)


def _turned(source: Source, options: Options, basis: Basis) -> Iterator[tuple[str, QTensor | Tensor, WeightReport]]:
    for name, value in basis.turned((name, source.tensor(name)) for name in source.names):
        known, published = name if name in source.shapes else "embed.weight", source.published(name)
        format = options.of(name) if known in source.matrices else None
        if format is None:
            kept = value.to(_kept_dtype(source, known, True))
            yield name, kept, weight_report(published, kept, kept, "float", kept.nbytes, 0)
            continue
        found = quantise(value, format, search=options.search, name=published)
        nbytes = format.nbytes(*source.matrices[known])
        yield name, found, weight_report(published, value, found, format.name, nbytes, 0)


def _round(weight: Tensor, format: Format, options: Options, statistics: InputStatistics | None, name: str) -> QTensor:
    importance = None if statistics is None else statistics.importance
    if importance is not None and statistics is not None and statistics.gram is not None:
        return gptq(weight, format, statistics.gram, act_order=options.act_order, name=name)
    return quantise(weight, format, importance=importance, search=options.search, name=name)


def _examples(source: Source, options: Options) -> list[Example]:
    source.require_tokenizer("calibration")
    tokenizer = source.tokenizer()
    if options.text is not None:
        return file_examples(tokenizer, options.text, options.samples, "calibration_file")
    return task_examples(tokenizer, "train", options.samples, options.seed)


def _write_small_files(directory: Path, source: Source, options: Options, basis: Basis | None) -> None:
    rotation = None if basis is None else Rotation(basis.seed, basis.block)
    config = QuantConfig(options.format, options.head_format, options.calibration, rotation)
    text = json.dumps({**source.config_json, "quantization_config": config.to_json()}, indent=2) + "\n"
    source.write_small_files(directory)
    # Last: without a config.json a half-written directory is no model.
    place(directory / "config.json", text.encode())


def measure(model: str | Path, out: str | Path, report: Report, *, per_task: int, seed: int = 1) -> Report:
    """The report with loss and accuracy before and after, written again. Loads both models whole; `per_task` samples of
    every task for the accuracy, as many of the mix as those together for the loss, all from the test split."""
    from dfastllm.train.evaluate import evaluate

    source = open_source(model)
    source.require_tokenizer("measuring quality")
    examples = task_examples(source.tokenizer(), "test", 6 * per_task, seed)
    float_model = source.float_model()
    before, reference = mean_loss(float_model, examples), log_probabilities(float_model, examples)
    family, config, info = read_model(Path(out))
    basis = basis_in(Path(out), float_model)
    held = config if basis is None else replace(config, tied=False)
    shapes = skeleton(held, info, torch.float32)
    weights: Sequence[tuple[str, QTensor | Tensor]] = list(read_stored(Path(out), family, shapes))
    rounded = simulate(float_model, weights, basis=basis)
    after, found = mean_loss(rounded, examples), log_probabilities(rounded, examples)
    distance, agreement = divergence(reference, found)
    del float_model, rounded, weights, reference, found
    accuracy = [evaluate(path, per_task=per_task, seed=seed) for path in (source.directory, Path(out))]
    quality = Quality(
        samples=per_task,
        divergence=distance,
        agreement=agreement,
        loss_before=before,
        loss_after=after,
        accuracy_before=accuracy[0].accuracy,
        accuracy_after=accuracy[1].accuracy,
        total_before=accuracy[0].total,
        total_after=accuracy[1].total,
    )
    measured = replace(report, quality=quality)
    measured.write(Path(out))
    return measured
