"""The quant section, and the step at which rounding begins."""

from __future__ import annotations

from typing import Any

import pytest

from dfastllm.distill.qat import QatConfig, should_enable_qat
from dfastllm.errors import DFastLLMError, UnsupportedError, ValidationError


def test_defaults_are_the_specifications() -> None:
    config = QatConfig()
    assert (config.enabled, config.start_fraction, config.lr_multiplier) == (False, 0.8, 0.1)
    assert (config.weight_bits, config.act_bits, config.format) == (8, 8, "w8g")
    assert config.search is True
    assert (config.check_every, config.min_cosine, config.strikes, config.tries) == (100, 0.98, 3, 2)


@pytest.mark.parametrize(
    ("raw", "format", "bits"),
    [
        ({"weight_bits": 8}, "w8g", 8),
        ({"format": "w8"}, "w8", 8),
        ({"weight_bits": 4}, "w4", 4),
        ({"format": "w8g"}, "w8g", 8),
        ({"format": "w4"}, "w4", 4),
        ({"format": "w8g", "weight_bits": 8}, "w8g", 8),
        ({"format": "w4m", "weight_bits": 4}, "w4m", 4),
        ({"format": "w6"}, "w6", 6),
    ],
)
def test_bits_and_format(raw: dict[str, Any], format: str, bits: int) -> None:
    config = QatConfig.of(raw)
    assert (config.format, config.weight_bits) == (format, bits)


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        ({"enabel": True}, "unknown key.* enabel; there are enabled, start_fraction"),
        ({"enabled": "yes"}, "enabled must be true or false, got 'yes'"),
        ({"search": 1}, "search must be true or false"),
        ({"start_fraction": 1.0}, r"start_fraction must be in \[0, 1\), got 1.0"),
        ({"start_fraction": -0.1}, "start_fraction"),
        ({"start_fraction": float("nan")}, "start_fraction"),
        ({"start_fraction": True}, "start_fraction"),
        ({"lr_multiplier": 0}, r"lr_multiplier must be in \(0, 1\]"),
        ({"lr_multiplier": "0.1"}, "lr_multiplier"),
        ({"min_cosine": 1.5}, "min_cosine"),
        ({"check_every": 0}, "check_every must be a whole number"),
        ({"check_every": 1.5}, "check_every must be a whole number"),
        ({"strikes": 0}, "strikes"),
        ({"tries": 0}, "tries"),
        ({"weight_bits": 3}, "weight_bits must be 8 or 4, got 3"),
        ({"weight_bits": True}, "weight_bits"),
        ({"format": "w5"}, "format must be w8, w8r, w8g"),
        ({"head": "w5"}, "head must be"),
        ({"format": "w4", "weight_bits": 8}, "format w4 has 4 bits a weight, but weight_bits is 8"),
    ],
)
def test_what_is_wrong_is_named(raw: dict[str, Any], match: str) -> None:
    with pytest.raises(ValidationError, match=match) as caught:
        QatConfig.of(raw)
    assert caught.value.param in raw


def test_other_activations_are_not_supported() -> None:
    with pytest.raises(UnsupportedError, match="act_bits must be 8, got 4"):
        QatConfig.of({"act_bits": 4})
    for wrong in ({"format": "w8r"}, {"format": "w4r"}, {"format": "w8", "head": "w8gr"}):
        with pytest.raises(UnsupportedError, match="rounds the matrices of a model in another basis"):
            QatConfig.of(wrong)
    with pytest.raises(ValidationError, match="quant must be an object"):
        QatConfig.of([1])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fraction", "total", "first"), [(0.8, 1000, 800), (0.0, 10, 0), (0.5, 7, 3), (0.999, 10, 9), (0.29, 100, 28)]
)
def test_start(fraction: float, total: int, first: int) -> None:
    """int(total * fraction), as it is specified: .29 of 100 is 28.999 in floats."""
    config = QatConfig(enabled=True, start_fraction=fraction)
    steps = [step for step in range(total) if should_enable_qat(step, total, config)]
    assert steps == list(range(first, total))


def test_disabled_never_starts() -> None:
    for config in (None, {}, {"enabled": False}, {"start_fraction": 0.0}, QatConfig(start_fraction=0.0)):
        assert not any(should_enable_qat(step, 10, config) for step in range(10))


def test_impossible_steps() -> None:
    for step, total in ((-1, 10), (0, 0)):
        with pytest.raises(DFastLLMError, match="must be at least"):
            should_enable_qat(step, total, {"enabled": True})
