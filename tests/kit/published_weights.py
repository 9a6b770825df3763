"""Tiny models as other programs publish them quantised: plain encoders, written from the layouts with loops over the
numbers of a word, and what their weights then are as floats. No code of dfastllm.quant.published.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Encoded = tuple[dict[str, Tensor], Tensor]  # tensors by the end of their name, and the float32 matrix they mean
NF4 = torch.tensor(
    [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0,
     0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
)  # fmt: skip


def words(codes: Tensor, bits: int) -> Tensor:
    """[rows, count] -> int32 [rows, count * bits / 32]: each row one long number, the first code lowest."""
    out = []
    for row in codes.tolist():
        whole = sum(int(code) << bits * i for i, code in enumerate(row))
        count = -(-len(row) * bits // 32)
        out.append([whole >> 32 * i & 0xFFFFFFFF for i in range(count)])
    return torch.tensor(out, dtype=torch.int64).to(torch.int32)


def affine(w: Tensor, bits: int, group: int, middle: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, float16 scales, zeros [n, groups], and the matrix they mean."""
    view, top = w.view(len(w), -1, group), 2**bits - 1
    if middle:
        scales = (view.abs().amax(-1) * 2 / top).half().float()
        zeros = torch.full_like(scales, (top + 1) // 2)
    else:
        low, high = view.amin(-1).clamp(max=0), view.amax(-1).clamp(min=0)
        scales = ((high - low) / top).half().float()
        zeros = (-low / scales).round().clamp(1, top)
    codes = (view / scales[..., None] + zeros[..., None]).round().clamp(0, top)
    value = (codes - zeros[..., None]) * scales[..., None]
    return codes.view_as(w).int(), scales, zeros.int(), value.view_as(w)


def gptq(w: Tensor, *, bits: int = 4, group: int = 32, order: bool = False, middle: bool = True) -> Encoded:
    k = w.shape[1]
    order_ = torch.randperm(k, generator=torch.Generator().manual_seed(k)) if order else torch.arange(k)
    codes, scales, zeros, value = affine(w[:, order_], bits, group, middle)
    back = order_.argsort()
    tensors = {
        "qweight": words(codes[:, back], bits).t(),
        "qzeros": words((zeros - 1).t(), bits),
        "scales": scales.t().half(),
        "g_idx": (torch.arange(k) // group)[back].int(),
    }
    return tensors, value[:, back]


def awq(w: Tensor, *, gemv: bool = False) -> Encoded:
    group = 32
    codes, scales, zeros, value = affine(w, 4, group, False)
    if gemv:
        width = -(-scales.shape[1] // 8)
        wide = torch.zeros(len(w), width * 8)
        wide[:, : scales.shape[1]] = scales
        full = torch.zeros(len(w), width * 8, dtype=torch.int32)
        full[:, : scales.shape[1]] = zeros
        return {"qweight": words(codes, 4), "qzeros": words(full, 4), "scales": wide.half()}, value

    def mixed(side: Tensor) -> Tensor:
        eights = side.view(len(side), -1, 8)
        return words(eights[..., [0, 2, 4, 6, 1, 3, 5, 7]].reshape(len(side), -1), 4)

    tensors = {"qweight": mixed(codes.t().contiguous()), "qzeros": mixed(zeros.t().contiguous())}
    return {**tensors, "scales": scales.t().half()}, value


def packed4(w: Tensor) -> Encoded:
    codes, scales, _, value = affine(w, 4, 32, True)
    shape = torch.tensor(w.shape)
    return {"weight_packed": words(codes, 4), "weight_scale": scales.half(), "weight_shape": shape}, value


def rows8(w: Tensor) -> Encoded:
    scale = w.abs().amax(1, keepdim=True) / 127
    codes = (w / scale).round()
    return {"weight": codes.to(torch.int8), "weight_scale": scale}, codes * scale


def blocks8(w: Tensor) -> Encoded:
    """Blocks of 48 x 40, which divide nothing here."""
    n, k = w.shape
    scales = torch.rand(-(-n // 48), -(-k // 40), generator=torch.Generator().manual_seed(n)) * 0.01 + 0.001
    spread = scales.repeat_interleave(48, 0)[:n].repeat_interleave(40, 1)[:, :k]
    codes = (w / spread).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": scales}, codes.float() * spread


def nf4(w: Tensor) -> Encoded:
    """Doubly quantised absmax, of a table of its own."""
    flat = w.reshape(-1, 64)
    absmax = flat.abs().amax(1)
    offset, table = float(absmax.mean()), torch.linspace(-1, 1, 256)
    outer = (absmax - offset).view(-1, 16).abs().amax(1)
    inner = ((absmax - offset).view(-1, 16) / outer[:, None] * 127.5 + 127.5).round().clamp(0, 255).view(-1)
    real = table[inner.long()] * outer.repeat_interleave(16) + offset
    codes = (flat[..., None] / real[:, None, None] - NF4).abs().argmin(-1).view(-1)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": list(w.shape),
             "nested_blocksize": 16, "nested_dtype": "float32", "nested_offset": offset}  # fmt: skip
    tensors = {
        "weight": (codes[0::2] << 4 | codes[1::2]).to(torch.uint8)[:, None],
        "weight.absmax": inner.to(torch.uint8),
        "weight.quant_map": NF4,
        "weight.nested_absmax": outer,
        "weight.nested_quant_map": table,
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }
    return tensors, (NF4[codes].view_as(flat) * real[:, None]).view_as(w)


def int8(w: Tensor) -> Encoded:
    largest = w.abs().amax(1)
    codes = (w / largest[:, None] * 127).round()
    return {"weight": codes.to(torch.int8), "SCB": largest}, codes * (largest / 127)[:, None]


def ao_int4(w: Tensor) -> Encoded:
    view = w.view(len(w), -1, 32)
    low, high = view.amin(-1), view.amax(-1)
    scales = ((high - low) / 15).half().float()
    offsets = (low + 8 * scales).half().float()
    codes = ((view - offsets[..., None]) / scales[..., None]).round().clamp(-8, 7)
    value = (codes * scales[..., None] + offsets[..., None]).view_as(w)
    bits = codes.view_as(w).int() & 15
    tensors = {"_weight_qdata": (bits[:, 0::2] | bits[:, 1::2] << 4).to(torch.uint8)}
    return {**tensors, "_weight_scale": scales.t().half(), "_weight_zero_point": offsets.t().half()}, value


def mlx(w: Tensor, *, bits: int = 4) -> Encoded:
    view, top = w.view(len(w), -1, 32), 2**bits - 1
    low, high = view.amin(-1), view.amax(-1)
    scales, offsets = ((high - low) / top).half().float(), low.half().float()
    codes = ((view - offsets[..., None]) / scales[..., None]).round().clamp(0, top)
    value = (codes * scales[..., None] + offsets[..., None]).view_as(w)
    packed = words(codes.view_as(w).int(), bits).view(torch.uint32)
    return {"weight": packed, "scales": scales.half(), "biases": offsets.half()}, value


def _compressed(layout: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group},
            "ignore": ["lm_head", "re:.*down_proj$"]}  # fmt: skip


# method -> (encoder, quantization_config)
METHODS: Mapping[str, tuple[Callable[[Tensor], Encoded], dict[str, Any]]] = {
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}),
    "gptq-order": (
        lambda w: gptq(w, order=True, middle=False),
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": False},
    ),
    "gptq-8": (lambda w: gptq(w, bits=8, group=64), {"quant_method": "gptq", "bits": 8, "group_size": 64}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}),
    "awq-gemv": (
        lambda w: awq(w, gemv=True),
        {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "GEMV"},
    ),
    "w4a16": (packed4, _compressed("pack-quantized", num_bits=4, strategy="group", group_size=32, symmetric=True)),
    "w8a8": (rows8, _compressed("int-quantized", num_bits=8, strategy="channel", symmetric=True)),
    "fp8": (blocks8, {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [48, 40],
                      "modules_to_not_convert": ["lm_head"]}),
    "nf4": (nf4, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
                  "bnb_4bit_use_double_quant": True, "llm_int8_skip_modules": ["lm_head"]}),
    "int8": (int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "torchao": (ao_int4, {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4WeightOnlyConfig"}}}),
    "mlx": (mlx, {"group_size": 32, "bits": 4}),
}  # fmt: skip


def publish(directory: Path, method: str, *, embedding: bool = False) -> dict[str, Tensor]:
    """Quantise the float checkpoint in a directory in place, all matrices of its layers (and with `embedding` that
    too); returns what each quantised weight now is, float32, by published name. With compressed-tensors, down_proj is
    left out, as `ignore` says; routers are quantised by MLX alone."""
    encode, config = METHODS[method]
    path = directory / "model.safetensors"
    tensors, meant, said = load_file(path), {}, {}
    for name, value in list(tensors.items()):
        left = ("ignore" in config and "down_proj" in name) or (method != "mlx" and name.endswith("mlp.gate.weight"))
        inside = "layers." in name or (embedding and "embed" in name)
        if value.ndim != 2 or not inside or left or not name.endswith(".weight"):
            continue
        del tensors[name]
        parts, meant[name] = encode(value.float())
        owner = name.removesuffix(".weight")
        tensors |= {f"{owner}.{part}": part_value.contiguous().clone() for part, part_value in parts.items()}
        said[name] = json.dumps({"_type": "Int4Tensor", "_data": {"block_size": [1, 32]}})
    save_file(tensors, path, metadata=said if method == "torchao" else {"format": "pt"})
    file = directory / "config.json"
    key = "quantization" if method == "mlx" else "quantization_config"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: config}))
    return meant
