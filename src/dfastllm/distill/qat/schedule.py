"""When quantisation-aware training begins, and what it rounds to: the `quant` section of a configuration.

Knows numbers and names only, no tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from dfastllm.errors import UnsupportedError, ValidationError
from dfastllm.quant.formats import FORMATS, find_format

__all__ = ["OF_BITS", "QatConfig", "should_enable_qat"]

# Bits of a weight -> the format that is meant where none is named. Of the two with 8 bits the one that holds a model
# which nobody has measured (docs/quantisation.md).
OF_BITS = {8: "w8g", 4: "w4"}


@dataclass(frozen=True, slots=True)
class QatConfig:
    """How a student is trained for the kernels that will serve it. Raises ValidationError naming the field that is
    wrong, UnsupportedError for activations of other than 8 bits, which no kernel has.

    enabled         False: train in float to the end.
    start_fraction  share of the steps that are trained in float first, in [0, 1).
    lr_multiplier   factor on the learning rate while weights are rounded, in (0, 1].
    weight_bits     8 or 4, for a format that is not named; None: the bits of `format`, 8 without one.
    act_bits        8: what the kernels round a layer's inputs to.
    format          of the layers' matrices, as `dfastllm quantize` names it; "": w8g for 8 bits, w4 for 4.
    head            format of embedding and head, "float" keeps them; "": as `dfastllm quantize` does (w8g beside w4).
    search          True: scales by the search that `dfastllm quantize` does; False: plain rounding to nearest.
    check_every     steps between stability checks.
    min_cosine      logits that are less alike than this, to those of the same weights unrounded, count as a strike.
    strikes         so many checks in a row below `min_cosine` end a try; a NaN ends it at once.
    tries           so many tries that ended badly, and the run finishes in float.
    """

    enabled: bool = False
    start_fraction: float = 0.8
    lr_multiplier: float = 0.1
    weight_bits: int | None = None
    act_bits: int = 8
    format: str = ""
    head: str = ""
    search: bool = True
    check_every: int = 100
    min_cosine: float = 0.98
    strikes: int = 3
    tries: int = 2

    def __post_init__(self) -> None:
        for name in ("enabled", "search"):
            if not isinstance(getattr(self, name), bool):
                raise ValidationError(f"{name} must be true or false, got {getattr(self, name)!r}.", param=name)
        self._number("start_fraction", "in [0, 1)", lambda value: 0 <= value < 1)
        self._number("lr_multiplier", "in (0, 1]", lambda value: 0 < value <= 1)
        self._number("min_cosine", "in [-1, 1]", lambda value: -1 <= value <= 1)
        for name in ("check_every", "strikes", "tries"):
            self._number(name, "a whole number of at least 1", lambda value: isinstance(value, int) and value >= 1)
        if self.act_bits != 8 or isinstance(self.act_bits, bool):
            raise UnsupportedError(
                f"act_bits must be 8, got {self.act_bits!r}: the kernels round a layer's inputs to int8.",
                param="act_bits",
            )
        self._settle_format()

    def _number(self, name: str, wanted: str, right: Any) -> None:
        value = getattr(self, name)
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or not right(value):
            raise ValidationError(f"{name} must be {wanted}, got {value!r}.", param=name)

    def _settle_format(self) -> None:
        """Fill in the one of format and weight_bits that was not given."""
        if self.head not in ("", "float"):
            find_format(self.head, "head")
        bits = self.weight_bits
        if not self.format:
            wanted = 8 if bits is None else bits
            if isinstance(wanted, bool) or wanted not in OF_BITS:
                raise ValidationError(
                    f"weight_bits must be {' or '.join(map(str, OF_BITS))}, got {bits!r}.",
                    param="weight_bits",
                    hint=f"Or name a format: {', '.join(FORMATS)}.",
                )
            object.__setattr__(self, "format", OF_BITS[wanted])
        for name in (self.format, self.head):
            if name in FORMATS and FORMATS[name].turned:
                raise UnsupportedError(
                    f"{name} rounds the matrices of a model in another basis; training rounds those of its own.",
                    param="format",
                    hint="Train for w8g, or quantise the trained model.",
                )
        has = find_format(self.format).code_bits
        if bits not in (None, has):
            raise ValidationError(
                f"format {self.format} has {has} bits a weight, but weight_bits is {bits!r}.",
                param="weight_bits",
                hint="Give one of the two.",
            )
        object.__setattr__(self, "weight_bits", has)

    @staticmethod
    def of(raw: QatConfig | Mapping[str, Any] | None) -> QatConfig:
        """From a section of a configuration; nothing, or an empty one, is disabled. Raises ValidationError for an
        unknown key."""
        if isinstance(raw, QatConfig):
            return raw
        if raw is None:
            return QatConfig()
        if not isinstance(raw, Mapping):
            raise ValidationError(f"quant must be an object, got {raw!r:.80}.", param="quant")
        known = [field.name for field in fields(QatConfig)]
        unknown = sorted(map(str, raw.keys() - set(known)))
        if unknown:
            raise ValidationError(
                f"quant has unknown key(s) {', '.join(unknown)}; there are {', '.join(known)}.", param=unknown[0]
            )
        return QatConfig(**raw)


def should_enable_qat(step: int, total_steps: int, config: QatConfig | Mapping[str, Any] | None) -> bool:
    """Whether weights are rounded at this step (0-based): from int(total_steps * start_fraction) on. config: a
    QatConfig, or a mapping with its keys; None or {}: disabled. Raises ValidationError for a negative step, a run
    without steps, and as QatConfig does."""
    found = QatConfig.of(config)
    if step < 0:
        raise ValidationError(f"step must be at least 0, got {step}.", param="step")
    if total_steps < 1:
        raise ValidationError(f"total_steps must be at least 1, got {total_steps}.", param="total_steps")
    return found.enabled and step >= int(total_steps * found.start_fraction)
