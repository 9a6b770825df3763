"""What each library wrote is read as the library itself reads it: the files were made with the libraries (make_files),
the tests need none of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dfastllm.kernels.packed import QTensor
from dfastllm.quant.checkpoint import Stored
from dfastllm.quant.header import TensorEntry, read_header
from dfastllm.quant.published import by_config, by_names
from dfastllm.quant.stream import read_tensor

HERE = Path(__file__).parent
CONFIGS = json.loads((HERE / "cases.json").read_text())
FILES = {
    case: file
    for file in sorted(HERE.glob("*.safetensors"))
    for case in CONFIGS
    if f"wanted:{case}" in read_header(file)
}
# case -> (what it is held as, whether that is exactly what the file says)
HELD = {
    "gptq_4_32": ("w4g", True),
    "gptq_4_64_zeros": ("w4g", False),  # scale times zero has more bits than a float16
    "gptq_4_v2": ("w4g", False),
    "gptq_4_order": ("w8g", False),  # groups of inputs that are not neighbours
    "gptq_8_32": ("w8g", True),
    "gptq_8_row": ("w8", True),
    "gptq_2_16": ("w6g", True),
    "awq_gemm": ("w4g", False),
    "awq_gemm_128": ("w4g", False),
    "awq_gemv": ("w4g", False),
    "ct_w4_128": ("w4g", True),
    "ct_w4_zeros": ("w4g", True),  # bfloat16 scales leave room for a zero point
    "ct_w4_row": ("w4g", True),
    "ct_w3_32": ("w4g", True),
    "ct_w8_row": ("w8", True),
    "ct_w8_tensor": ("w8", True),
    "ct_w8_zeros": ("w8g", False),
    "ct_fp8_row": ("w8g", False),
    "ct_fp8_tensor": ("w8g", False),
    "ct_fp8_block": ("w8g", False),
    "bnb_nf4": ("w8g", False),
    "bnb_nf4_nested": ("w8g", False),
    "bnb_fp4": ("w8g", False),
    "bnb_int8": ("w8", True),
    "ao_int8": ("w8", True),
    "ao_int4": ("w4g", False),  # float32 scales
    "ao_fp8": ("w8g", False),
    "mlx_4_32": ("w4g", True),
    "mlx_4_64": ("w4g", True),
    "mlx_4_128": ("w4g", True),
    "mlx_8_64": ("w8g", False),  # 8 bits with a minimum
    "mlx_2_64": ("w4g", True),
    "mlx_3_64": ("w4g", True),
    "mlx_5_64": ("w6g", True),
    "mlx_6_32": ("w6g", True),
}


def tensors_of(case: str) -> dict[str, TensorEntry]:
    return {name: entry for name, entry in read_header(FILES[case]).items() if name.startswith(f"{case}.")}


def weight_of(case: str) -> Stored:
    weights = by_config(CONFIGS[case], "config.json").weights(tensors_of(case))
    assert list(weights) == [f"{case}.weight"]
    return weights[f"{case}.weight"]


def wanted(case: str) -> Tensor:
    name = f"wanted:{case}"
    return read_tensor(read_header(FILES[case])[name], name)


def opened(case: str, exact: bool) -> tuple[QTensor | Tensor, str | None]:
    weight = weight_of(case)
    assert weight.opened is not None
    return weight.opened(exact)


def test_every_case_has_its_row() -> None:
    assert HELD.keys() == CONFIGS.keys() == FILES.keys()


@pytest.mark.parametrize("case", CONFIGS)
def test_as_the_library_dequantises(case: str) -> None:
    """In float32 from the same codes and scales. torchao and LLM.int8() give bfloat16 and float16, and libraries differ
    in the order of their products: one rounding of the type they compute in."""
    value, note = opened(case, exact=True)
    right = wanted(case)
    assert isinstance(value, Tensor)
    assert note is None
    assert value.shape == weight_of(case).shape == right.shape
    step = {"ao": 2.0**-8, "bnb_int8": 2.0**-11}.get(case if case == "bnb_int8" else case.partition("_")[0], 2.0**-22)
    torch.testing.assert_close(value, right, rtol=step, atol=step * float(right.abs().max()))


@pytest.mark.parametrize("case", CONFIGS)
def test_packed_in_the_format_that_holds_it(case: str) -> None:
    value, note = opened(case, exact=False)
    right, _ = opened(case, exact=True)
    assert isinstance(value, QTensor)
    assert isinstance(right, Tensor)
    form, exact = HELD[case]
    assert value.format == form
    assert (note is None) == exact
    if exact:
        assert torch.equal(value.dequantise(), right)
    elif form == "w8g":  # rounded to 127ths of the largest of 32
        largest = right.view(len(right), -1, 32).abs().amax(-1, keepdim=True)
        moved = (value.dequantise() - right).view(len(right), -1, 32).abs()
        assert bool((moved <= largest / 250).all())
    else:  # the minimum is rounded: at most 2^-11 of 16 steps
        assert value.scales is not None
        assert note is not None
        steps = value.scales.float().repeat_interleave(32, 1)
        assert bool(((value.dequantise() - right).abs() <= 2.0**-7 * steps * 1.001).all())
        assert 0 < float(note.rpartition(" at most ")[2].split()[0]) < 2.0**-6


@pytest.mark.parametrize(
    "case", ["gptq_4_32", "gptq_8_32", "gptq_4_64_zeros", "awq_gemm", "bnb_nf4", "bnb_int8", "ao_int8"]
)
def test_told_by_the_names_alone(case: str) -> None:
    """Where config.json says nothing, and the shapes tell all."""
    found = tensors_of(case)
    method = by_names(found, HERE)
    assert method is not None
    weight = method.weights(found)[f"{case}.weight"]
    assert weight.opened is not None
    value, _ = weight.opened(True)
    right, _ = opened(case, exact=True)
    assert isinstance(value, Tensor)
    assert isinstance(right, Tensor)
    assert torch.equal(value, right)
