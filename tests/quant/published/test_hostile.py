"""Whatever a file or a configuration holds, an error of ours names it, and nothing takes long."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dfastllm.errors import CheckpointError, DFastLLMError, ModelLoadError
from dfastllm.quant.header import TensorEntry
from dfastllm.quant.published import METHODS, by_config, by_names
from dfastllm.quant.published.parts import fields, pattern_of
from tests.quant.published.test_libraries import CONFIGS, tensors_of

DTYPES = ["F32", "F16", "BF16", "I32", "I64", "I8", "U8", "U32", "F8_E4M3", "F8_E8M0", "BOOL", "Q4"]
sizes = st.integers(0, 300) | st.sampled_from([1 << 31, 1 << 62])
shapes = st.lists(sizes, max_size=3).map(tuple)


@settings(max_examples=12, deadline=None)
@given(
    drops=st.sets(st.integers(0, 9), max_size=2),
    dtypes=st.dictionaries(st.integers(0, 9), st.sampled_from(DTYPES), max_size=2),
    changed=st.dictionaries(st.integers(0, 9), shapes, max_size=2),
)
@pytest.mark.parametrize("case", sorted(CONFIGS))
def test_headers(case: str, drops: set[int], dtypes: dict[int, str], changed: dict[int, tuple[int, ...]]) -> None:
    found: dict[str, TensorEntry] = {}
    for i, (name, entry) in enumerate(tensors_of(case).items()):
        if i not in drops:
            shape = changed.get(i, entry.shape)
            found[name] = replace(entry, dtype=dtypes.get(i, entry.dtype), shape=shape)
    for told in (lambda: by_config(CONFIGS[case], "config.json"), lambda: by_names(found, Path("here"))):
        try:
            method = told()
            weights = {} if method is None else method.weights(found)
            for weight in weights.values():
                if weight.opened is not None and len(weight.shape) == 2 and max(weight.shape) < 1000:
                    weight.opened(True)
                    weight.opened(False)
        except DFastLLMError:
            continue


values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 200) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)
KEYS = sorted({key for config in CONFIGS.values() for key in config} | {"dynamic", "mode", "weight_block_size", "fmt"})


@settings(max_examples=60, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(KEYS), values, max_size=3))
@pytest.mark.parametrize("method", sorted(METHODS))
def test_settings(method: str, changes: dict[str, Any]) -> None:
    base = next((c for c in CONFIGS.values() if c.get("quant_method", "mlx") == method), {"quant_method": method})
    said: ModelLoadError | None = None
    try:
        assert by_config({**base, **changes}, "config.json").label
    except ModelLoadError as error:
        said = error
    assert said is None or ("config.json" in str(said) and said.param == "quantization_config")


@pytest.mark.parametrize(
    "pattern",
    [r"(a+)+$", r"(.*)*x", r"((a*)b)*c", r".*a.*b.*c.*d.*e", r"(a|b+){9}", "x" * 201, "("],
)
def test_patterns_that_could_take_long(pattern: str) -> None:
    began = time.monotonic()
    with pytest.raises(ModelLoadError, match="supported: "):
        pattern_of(pattern, "dynamic", "config.json")
    assert time.monotonic() - began < 1


@pytest.mark.parametrize(
    "pattern",
    [r".*lm_head", r"model\.layers\.(0|1|2)\..*", r".*\.(?:1[0-9]|2)\.(?:q|k)_proj$", r"^(?!.*visual).*$", r"a\+\+"],
)
def test_patterns_that_files_have(pattern: str) -> None:
    assert pattern_of(pattern, "targets", "config.json") == pattern


@pytest.mark.parametrize("bits", range(1, 9))
def test_numbers_of_so_many_bits(bits: int) -> None:
    """Against one long number, shifted."""
    words = torch.randint(-(1 << 31), 1 << 31, (3, 9), generator=torch.Generator().manual_seed(bits)).to(torch.int32)
    count = 9 * 32 // bits
    for row, got in zip(words.tolist(), fields(words, bits, count).tolist(), strict=True):
        whole = sum((word & 0xFFFFFFFF) << 32 * i for i, word in enumerate(row))
        assert got == [whole >> bits * i & (1 << bits) - 1 for i in range(count)]


def test_empty_matrices_are_named() -> None:
    entries = tensors_of("gptq_8_row")
    empty = {
        name: replace(entry, shape=(0, 32)) if name.endswith("qweight") else entry for name, entry in entries.items()
    }
    with pytest.raises(CheckpointError, match="GPTQ wants rows"):
        by_config(CONFIGS["gptq_8_row"], "config.json").weights(empty)
