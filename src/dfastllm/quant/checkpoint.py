"""Quantised weights in a Hugging Face directory: what config.json says of them, how tensors are named and packed.

    config.json   "quantization_config": {"quant_method": "dfastllm", "version": 1, "format": "w4", "head": "w8g", ...}
    NAME.codes    w8, w8g: I8 [n, k]. w4g: U8 [n, k / 2], the even input in the low nibble. w6g: U8 [n, k * 3 / 4],
                  four codes in three bytes, lowest bits first
    NAME.scales   w8, w4s: F32 [n]. Others: F16 [n, k / group]
    NAME.mins     F16 [n, k / group], where the format has minima
    NAME.steps    w4s: U8 [n, k / 32], step - 1 in the low nibble, zero in the high one; its codes are as w4g's

    "rotation": {"kind": "hadamard", "seed": 0, "block": 256}, beside a format whose matrices were turned, names the
    basis (`models.basis`): codes are those of turned matrices, norms lie in the file as they were, and the head has a
    matrix of its own also where it was tied.

NAME is the published name of the weight that they stand for; tensors kept in float have their own name. The parts tell
the format by themselves (bytes of codes per scale), so a directory may mix formats. Knows no model: names are text
here, and which tensors there must be is for `models` to say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dfastllm.errors import CheckpointError, ModelLoadError
from dfastllm.kernels.packed import FORMS, GROUP, QTensor
from dfastllm.quant.formats import FORMATS, Format
from dfastllm.quant.stream import DTYPES, Entry, Planned, SafetensorsWriter, read_tensor

__all__ = [
    "METHOD",
    "QuantConfig",
    "Rotation",
    "Stored",
    "pack_bits",
    "plan",
    "read_one",
    "stored",
    "tensors_of",
    "unpack_bits",
    "write",
]

METHOD = "dfastllm"
VERSION = 1
PARTS = ("codes", "scales", "mins", "steps")
_ROTATION = "hadamard"
# bytes of codes under one scale -> natural form
_KIND_OF_BYTES = {form.group * form.bits // 8: name for name, form in FORMS.items() if form.group}


@dataclass(frozen=True, slots=True)
class Rotation:
    """The basis of a turned checkpoint; see `models.basis.basis_of`."""

    seed: int
    block: int

    def to_json(self) -> dict[str, Any]:
        return {"kind": _ROTATION, **asdict(self)}

    @staticmethod
    def parse(raw: object, where: str) -> Rotation:
        """Raises ModelLoadError for a basis of another kind, or numbers that no basis has."""
        known = isinstance(raw, Mapping) and raw.get("kind") == _ROTATION
        numbers = [raw.get(name) if isinstance(raw, Mapping) else None for name in ("seed", "block")]
        seed, block = numbers
        if not known or type(seed) is not int or type(block) is not int or block < 1 or block & (block - 1):
            raise ModelLoadError(
                f'{where}: quantization_config.rotation must be {{"kind": "{_ROTATION}", "seed": a whole number, '
                f'"block": a power of two}}, got {raw!r:.120}.',
                param="quantization_config",
                hint="Quantise the original again, or install a newer dfastllm.",
            )
        return Rotation(seed, block)


@dataclass(frozen=True, slots=True)
class QuantConfig:
    """config.json's `quantization_config`. format: of the layers' matrices; head: of embedding and head ("float": kept
    as they were); calibration: none, aware or gptq; rotation: the basis of a format that has turned matrices."""

    format: str
    head: str
    calibration: str = "none"
    rotation: Rotation | None = None

    @property
    def label(self) -> str:
        return self.format

    def to_json(self) -> dict[str, Any]:
        said = {"format": self.format, "head": self.head, "calibration": self.calibration}
        turned = {} if self.rotation is None else {"rotation": self.rotation.to_json()}
        return {"quant_method": METHOD, "version": VERSION, **said, **turned}

    @staticmethod
    def parse(raw: object, where: str = "config.json") -> QuantConfig:
        """Raises ModelLoadError for another method (named), another version, or unknown or missing fields."""
        if not isinstance(raw, Mapping):
            raise ModelLoadError(
                f"{where}: quantization_config must be an object, got {raw!r:.80}.", param="quantization_config"
            )
        method = raw.get("quant_method")
        if method != METHOD:
            raise ModelLoadError(
                f"{where}: checkpoints quantised by {method!r:.80} are not supported; supported: {METHOD!r}.",
                param="quantization_config",
                hint="Load the original bfloat16 or float32 checkpoint, or quantise it with `dfastllm quantize`.",
            )
        if raw.get("version") != VERSION:
            raise ModelLoadError(
                f"{where}: quantization_config has version {raw.get('version')!r}, this dfastllm reads {VERSION}.",
                param="quantization_config",
                hint="Quantise the original again, or install a newer dfastllm.",
            )
        allowed = {
            "format": tuple(FORMATS),
            "head": (*FORMATS, "float"),
            "calibration": ("none", "aware", "gptq"),
        }
        for field, values in allowed.items():
            if raw.get(field) not in values:
                raise ModelLoadError(
                    f"{where}: quantization_config.{field} must be one of {', '.join(values)}, "
                    f"got {raw.get(field)!r:.80}.",
                    param="quantization_config",
                )
        turned = FORMATS[raw["format"]].turned
        if not turned and raw.get("rotation") is not None:
            raise ModelLoadError(
                f"{where}: quantization_config.rotation is given, but format {raw['format']} has no turned matrices.",
                param="quantization_config",
            )
        rotation = Rotation.parse(raw.get("rotation"), where) if turned else None
        return QuantConfig(raw["format"], raw["head"], raw["calibration"], rotation)


@dataclass(frozen=True, slots=True)
class Stored:
    """One weight of a directory.

    kind    natural form; of a weight that another program quantised its method, in words; None for a float tensor.
    shape   of the weight it stands for.
    parts   tensor name in the file -> where it lies.
    opened  of a weight that another program quantised: reads it, as float32 (True) or packed (False), with a note where
            the packed one is not exactly what is stored.
    """

    kind: str | None
    shape: tuple[int, ...]
    parts: Mapping[str, Entry]
    opened: Callable[[bool], tuple[QTensor | Tensor, str | None]] | None = None

    @property
    def nbytes(self) -> int:
        entries = self.parts.values()
        return sum(math.prod(entry.shape) * DTYPES.get(entry.dtype, torch.float16).itemsize for entry in entries)

    @property
    def foreign(self) -> bool:
        """Whether another program quantised it."""
        return self.opened is not None


def stored(found: Mapping[str, Entry]) -> dict[str, Stored]:
    """Group a directory's tensors into weights. Raises CheckpointError naming a part that is missing, or does not fit
    its codes."""
    weights: dict[str, Stored] = {}
    for name, entry in found.items():
        owner, _, part = name.rpartition(".")
        if part not in PARTS:
            weights[name] = Stored(None, entry.shape, {name: entry})
        elif f"{owner}.codes" not in found:
            raise CheckpointError(f"{entry.file.name} has {name} without {owner}.codes.")
        elif part == "codes":
            parts = {f"{owner}.{p}": found[f"{owner}.{p}"] for p in PARTS if f"{owner}.{p}" in found}
            weights[owner] = _recognise(owner, parts)
    return weights


def _recognise(name: str, parts: Mapping[str, Entry]) -> Stored:
    codes, scales, mins, steps = (parts.get(f"{name}.{part}") for part in PARTS)
    shown = ", ".join(f"{part} {entry.dtype} {list(entry.shape)}" for part, entry in parts.items())
    bad = CheckpointError(f"{name}: its parts fit no format of dfastllm: {shown}.")
    if codes is None or len(codes.shape) != 2:
        raise bad
    if scales is None:
        raise CheckpointError(f"{codes.file.name} has {name}.codes without {name}.scales.")
    n, width = codes.shape
    if (scales.dtype, scales.shape, mins) == ("F32", (n,), None):
        if codes.dtype == "I8" and steps is None:
            return Stored("w8", (n, width), parts)
        fits = codes.dtype == "U8" and steps is not None and width % 16 == 0
        if fits and steps is not None and (steps.dtype, steps.shape) == ("U8", (n, width // 16)):
            return Stored("w4s", (n, 2 * width), parts)
    if steps is not None:
        raise bad
    if scales.dtype != "F16" or len(scales.shape) != 2 or scales.shape[0] != n or scales.shape[1] == 0:
        raise bad
    kind = _KIND_OF_BYTES.get(width // scales.shape[1]) if width % scales.shape[1] == 0 else None
    if kind is None or codes.dtype != ("I8" if kind == "w8g" else "U8"):
        raise bad
    if mins is not None and (kind == "w8g" or (mins.dtype, mins.shape) != ("F16", scales.shape)):
        raise bad
    return Stored(kind, (n, scales.shape[1] * GROUP[kind]), parts)


def pack_bits(kind: str, codes: Tensor) -> Tensor:
    """Natural codes [n, k] -> as they lie in the file."""
    if kind in ("w4g", "w4s"):
        return codes[:, 0::2] | codes[:, 1::2] << 4
    if kind == "w6g":
        a, b, c, d = codes.view(len(codes), -1, 4).unbind(-1)
        return torch.stack([a | b << 6, b >> 2 | c << 4, c >> 4 | d << 2], dim=-1).view(len(codes), -1)
    return codes


def unpack_bits(kind: str, data: Tensor) -> Tensor:
    """The inverse of `pack_bits`."""
    if kind in ("w4g", "w4s"):
        return torch.stack([data & 15, data >> 4], dim=-1).view(len(data), -1)
    if kind == "w6g":
        a, b, c = data.view(len(data), -1, 3).unbind(-1)
        codes = [a & 63, (a >> 6 | b << 2) & 63, (b >> 4 | c << 4) & 63, c >> 2]
        return torch.stack(codes, dim=-1).view(len(data), -1)
    return data


def read_one(name: str, weight: Stored) -> QTensor | Tensor:
    """The weight, read into memory of its own. Raises CheckpointError, also for scales that are not finite."""
    if weight.kind is None:
        return read_tensor(weight.parts[name], name)
    parts = {
        part: read_tensor(weight.parts[f"{name}.{part}"], name) for part in PARTS if f"{name}.{part}" in weight.parts
    }
    for part in ("scales", "mins"):
        if part in parts and not bool(parts[part].isfinite().all()):
            raise CheckpointError(f"{name}.{part} holds NaN or infinity.")
    codes = unpack_bits(weight.kind, parts["codes"])
    found = QTensor(weight.kind, codes, parts["scales"], parts.get("mins"), parts.get("steps"))
    if found.steps is not None and not found.steps_fit:
        raise CheckpointError(
            f"{name}.codes lie further from their zero than a signed byte holds in steps of {name}.steps.",
            hint="The file is damaged; quantise the original again.",
        )
    return found


def plan(name: str, format: Format, shape: tuple[int, int]) -> dict[str, Planned]:
    """The tensors that a weight of this format and shape [n, k] becomes, for a SafetensorsWriter."""
    n, k = shape
    if not format.group:
        codes = Planned(format.code_dtype, (n, k * format.code_bits // 8))
        whole = {f"{name}.codes": codes, f"{name}.scales": Planned(torch.float32, (n,))}
        steps = {f"{name}.steps": Planned(torch.uint8, (n, k // format.stepped))} if format.stepped else {}
        return whole | steps
    side = Planned(torch.float16, (n, k // format.group))
    parts = {f"{name}.codes": Planned(format.code_dtype, (n, k * format.code_bits // 8)), f"{name}.scales": side}
    return {**parts, f"{name}.mins": side} if format.grid.minimum else parts


def tensors_of(name: str, weight: QTensor) -> dict[str, Tensor]:
    """The tensors of one weight, as they lie in the file."""
    named = (("scales", weight.scales), ("mins", weight.mins), ("steps", weight.steps))
    sides = {f"{name}.{part}": value for part, value in named}
    found = {f"{name}.codes": pack_bits(weight.format, weight.codes), **sides}
    return {part: value for part, value in found.items() if value is not None}


def write(writer: SafetensorsWriter, name: str, weight: QTensor) -> None:
    """The parts of one planned weight."""
    for part, value in tensors_of(name, weight).items():
        writer.write(part, value)
