"""Makes the small files beside it with the libraries themselves: `python -m tests.quant.published.make_files`.

Needs torch and, in an environment of their own, compressed-tensors 0.20.0, torchao 0.18.0, bitsandbytes 0.50.2, mlx
and mlx-cpu 0.32.4, auto-gptq 0.7.1 (BUILD_CUDA_EXT=0) and autoawq 0.2.9; none of them is a dependency of dfastllm, and
the tests read the files alone. The last two import much that is not needed for one layer: their packages are entered
by the module that is.

One file a library: modules CASE with the tensors as the library writes them, and `wanted:CASE`, float32, the matrix as
the library itself dequantises it. cases.json: CASE -> quantization_config.
"""

# mypy: ignore-errors
# The libraries are not there where types are checked.

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

HERE = Path(__file__).parent
Case = tuple[dict[str, Any], dict[str, Tensor], Tensor]  # quantization_config, tensors, what is wanted


def entered(package: str) -> None:
    """A package whose own __init__ is not run."""
    found = importlib.util.find_spec(package)
    assert found is not None
    assert found.submodule_search_locations is not None
    for name in (package, f"{package}.utils", f"{package}.nn_modules"):
        module = types.ModuleType(name)
        module.__path__ = [str(Path(found.submodule_search_locations[0], *name.split(".")[1:]))]
        sys.modules[name] = module


def weight(n: int, k: int, seed: int = 0) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.05


def grid(w: Tensor, bits: int, groups: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """float16 scales and whole zeros [n, groups] of a plain rounding."""
    top, count = 2**bits - 1, int(groups.max()) + 1
    parts = [w[:, groups == g] for g in range(count)]
    low = torch.stack([p.amin(1) for p in parts], 1).clamp(max=0)
    high = torch.stack([p.amax(1) for p in parts], 1).clamp(min=0)
    if symmetric:
        scales = torch.maximum(-low, high) * 2 / top
        return scales.half().float(), torch.full_like(scales, (top + 1) // 2)
    scales = ((high - low) / top).half().float()
    return scales, (-low / scales).round().clamp(1, top)


def gptq() -> dict[str, Case]:
    entered("auto_gptq")
    linear = importlib.import_module("auto_gptq.nn_modules.qlinear.qlinear_cuda").QuantLinear
    cases: dict[str, Case] = {}
    for name, bits, group, symmetric, order in (
        ("gptq_4_32", 4, 32, True, False),
        ("gptq_4_64_zeros", 4, 64, False, False),
        ("gptq_4_order", 4, 32, True, True),
        ("gptq_8_32", 8, 32, True, False),
        ("gptq_8_row", 8, -1, True, False),
        ("gptq_2_16", 2, 16, True, False),
    ):
        w = weight(32, 64, bits)
        size = 64 if group == -1 else group
        groups = torch.arange(64) // size
        if order:
            groups = groups[torch.randperm(64, generator=torch.Generator().manual_seed(1))]
        scales, zeros = grid(w, bits, groups, symmetric)
        dense = nn.Linear(64, 32, bias=False)
        dense.weight.data = w
        made = linear(bits, group, 64, 32, bias=False)
        made.pack(dense, scales, zeros, groups.to(torch.int32))
        wanted = made.float()(torch.eye(64)).t().contiguous()
        tensors = {"qweight": made.qweight, "qzeros": made.qzeros, "scales": scales.t().half(), "g_idx": made.g_idx}
        config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": order, "sym": symmetric}
        cases[name] = (config, tensors, wanted)
    config, tensors, wanted = cases["gptq_4_64_zeros"]
    # The second format stores zero points as they are.
    second = {**tensors, "qzeros": tensors["qzeros"] + 0x11111111}
    cases["gptq_4_v2"] = ({**config, "checkpoint_format": "gptq_v2"}, second, wanted)
    return cases


def awq() -> dict[str, Case]:
    entered("awq")
    dequantised = importlib.import_module("awq.utils.packing_utils").dequantize_gemm
    gemm = importlib.import_module("awq.modules.linear.gemm").WQLinear_GEMM
    gemv = importlib.import_module("awq.modules.linear.gemv").WQLinear_GEMV
    cases: dict[str, Case] = {}
    for name, layer, group in (("awq_gemm", gemm, 32), ("awq_gemm_128", gemm, 128), ("awq_gemv", gemv, 64)):
        w = weight(32, 128, group)
        scales, zeros = grid(w, 4, torch.arange(128) // group, symmetric=False)
        spread = scales.repeat_interleave(group, 1), zeros.repeat_interleave(group, 1)
        codes = (w / spread[0] + spread[1]).round().clamp(0, 15)
        wanted = (codes - spread[1]) * spread[0]
        dense = nn.Linear(128, 32, bias=False)
        dense.weight.data = wanted
        sides = (scales, zeros) if layer is gemv else (scales.t().contiguous(), zeros.t().contiguous())
        made = layer.from_linear(dense, 4, group, False, *sides)
        if layer is gemm:
            again = dequantised(made.qweight, made.qzeros, made.scales.float(), 4, group).t().contiguous()
            assert torch.equal(again, wanted)
        tensors = {"qweight": made.qweight, "qzeros": made.qzeros, "scales": made.scales.half()}
        version = "gemv" if layer is gemv else "gemm"
        config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": version}
        cases[name] = (config, tensors, wanted)
    return cases


def compressed() -> dict[str, Case]:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    cases: dict[str, Case] = {}
    for name, layout, args in (
        ("ct_w4_128", "pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 128}),
        ("ct_w4_zeros", "pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}),
        ("ct_w4_row", "pack-quantized", {"num_bits": 4, "strategy": "channel"}),
        ("ct_w3_32", "pack-quantized", {"num_bits": 3, "strategy": "group", "group_size": 32}),
        ("ct_w8_row", "int-quantized", {"num_bits": 8, "strategy": "channel"}),
        ("ct_w8_tensor", "int-quantized", {"num_bits": 8, "strategy": "tensor"}),
        ("ct_w8_zeros", "int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}),
        ("ct_fp8_row", "float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
        ("ct_fp8_tensor", "float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
        ("ct_fp8_block", "float-quantized", {"num_bits": 8, "type": "float", "strategy": "block",
                                             "block_structure": [8, 32]}),
    ):  # fmt: skip
        n, k = 16, 128
        w = weight(n, k, len(cases))
        settings = QuantizationArgs(**args)
        group = args.get("group_size")
        if args["strategy"] == "block":
            view = w.view(n // 8, 8, k // 32, 32)
            low, high = view.amin((1, 3)), view.amax((1, 3))
        elif args["strategy"] == "tensor":
            low, high = w.amin().view(1), w.amax().view(1)
        else:
            view = w.view(n, -1, group or k)
            low, high = view.amin(2), view.amax(2)
        scale, zero = calculate_qparams(low, high, settings)
        scale = scale.bfloat16().float()  # as files have it
        scheme = QuantizationScheme(targets=["Linear"], weights=settings)
        coder = BaseCompressor.load_from_registry(layout)
        state = {"weight": w, "weight_scale": scale, "weight_zero_point": zero}
        made = coder.compress(state, scheme)
        wanted = coder.decompress(made, scheme)["weight"].float()
        tensors = {key: value for key, value in made.items() if isinstance(value, Tensor)}
        tensors["weight_scale"] = tensors["weight_scale"].bfloat16()
        if settings.symmetric:
            tensors.pop("weight_zero_point", None)
        config = {"quant_method": "compressed-tensors", "format": layout, "ignore": ["lm_head"],
                  "config_groups": {"group_0": {"targets": ["Linear"], "weights": args}}}  # fmt: skip
        cases[name] = (config, tensors, wanted)
    return cases


def bitsandbytes() -> dict[str, Case]:
    from bitsandbytes import functional

    cases: dict[str, Case] = {}
    for name, kind, nested in (("bnb_nf4", "nf4", False), ("bnb_nf4_nested", "nf4", True), ("bnb_fp4", "fp4", False)):
        w = weight(40, 64, len(cases))
        packed, state = functional.quantize_4bit(w, blocksize=64, quant_type=kind, compress_statistics=nested)
        wanted = functional.dequantize_4bit(packed, state)
        parts = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
        config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind,
                  "bnb_4bit_use_double_quant": nested}  # fmt: skip
        cases[name] = (config, {"weight": packed, **parts}, wanted)
    w = weight(16, 64, 9)
    codes, scales, _ = functional.int8_vectorwise_quant(w.half())
    wanted = functional.int8_vectorwise_dequant(codes, scales).float()
    tensors = {"weight": codes, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    cases["bnb_int8"] = ({"quant_method": "bitsandbytes", "load_in_8bit": True}, tensors, wanted)
    return cases


def torchao() -> dict[str, Case]:
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
    from torchao.quantization import quantize_ as quantise_

    cases: dict[str, Case] = {}
    for name, how in (
        ("ao_int8", Int8WeightOnlyConfig()),
        ("ao_int4", IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))),
        ("ao_fp8", Float8WeightOnlyConfig()),
    ):
        model = nn.ModuleDict({name: nn.Linear(64, 16, bias=False)})
        model[name].weight.data = weight(16, 64, len(cases))
        quantise_(model, how)
        flat, said = flatten_tensor_state_dict(model.state_dict())
        METADATA.update({key: text for key, text in said.items() if key != "tensor_names"})
        tensors = {key.removeprefix(f"{name}."): value for key, value in flat.items()}
        cases[name] = ({"quant_method": "torchao"}, tensors, model[name].weight.dequantize().float())
    return cases


def mlx() -> dict[str, Case]:
    import mlx.core as mx
    import numpy as np

    cases: dict[str, Case] = {}
    for bits, group in ((4, 32), (4, 64), (4, 128), (8, 64), (2, 64), (3, 64), (5, 64), (6, 32)):
        w = weight(16, 128, bits)
        made = mx.quantize(mx.array(w.numpy()).astype(mx.float16), group, bits)
        exact = [part.astype(mx.float32) for part in made[1:]]
        wanted = torch.from_numpy(np.array(mx.dequantize(made[0], *exact, group, bits)))
        words = torch.from_numpy(np.array(made[0]).view(np.int32)).view(torch.uint32)
        sides = [torch.from_numpy(np.array(part)) for part in made[1:]]
        tensors = {"weight": words, "scales": sides[0], "biases": sides[1]}
        cases[f"mlx_{bits}_{group}"] = ({"group_size": group, "bits": bits}, tensors, wanted)
    return cases


METADATA: dict[str, str] = {}


def main() -> None:
    configs: dict[str, Any] = {}
    for make in (gptq, awq, compressed, bitsandbytes, torchao, mlx):
        tensors: dict[str, Tensor] = {}
        for case, (config, parts, wanted) in make().items():
            configs[case] = config
            tensors |= {f"{case}.{part}": value.contiguous().clone() for part, value in parts.items()}
            tensors[f"wanted:{case}"] = wanted.contiguous().clone()
        save_file(tensors, HERE / f"{make.__name__}.safetensors", metadata=METADATA or None)
        METADATA.clear()
    (HERE / "cases.json").write_text(json.dumps(configs, indent=1) + "\n")


if __name__ == "__main__":
    main()
