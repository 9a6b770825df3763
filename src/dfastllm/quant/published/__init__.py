"""Quantised checkpoints as other programs publish them: told by config.json or by the names of their tensors, each
matrix then kept in the packed format that holds its codes, or converted when its turn comes, with a note.

Written from the formats, with none of the programs: what each file of this room opens with is its layout. Knows no
model: names of weights are text here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from dfastllm.errors import CheckpointError, ModelLoadError
from dfastllm.quant.checkpoint import Stored
from dfastllm.quant.published import awq, bitsandbytes, compressed, fp8, gptq, mlx, torchao
from dfastllm.quant.published.matrix import Codes, Matrix, Values, to_float, to_packed
from dfastllm.quant.stream import Entry

__all__ = ["METHODS", "Codes", "Matrix", "Method", "Values", "by_config", "by_names", "to_float", "to_packed"]


@runtime_checkable
class Method(Protocol):
    """How a checkpoint is quantised. label: in a few words."""

    @property
    def label(self) -> str: ...

    def weights(self, found: Mapping[str, Entry]) -> dict[str, Stored]:
        """A directory's tensors as weights, by the published name of each: MODULE.weight of a quantised module, with
        how to open it; all others as they are. Raises CheckpointError naming the file and tensor that is missing, or
        has another dtype or shape than the method's."""


METHODS: Mapping[str, Callable[[Mapping[str, Any], str], Method]] = {
    "gptq": gptq.parse,
    "awq": awq.parse,
    "compressed-tensors": compressed.parse,
    "fp8": fp8.parse,
    "fbgemm_fp8": fp8.parse,
    "bitsandbytes": bitsandbytes.parse,
    "torchao": torchao.parse,
    "mlx": mlx.parse,
}


def by_config(raw: object, where: str) -> Method:
    """The method of config.json's quantization_config (or of its "quantization", as MLX spells it). where: the file,
    for messages. Raises ModelLoadError for a method that is not read, and for settings of one that are not."""
    if not isinstance(raw, Mapping):
        raise ModelLoadError(
            f"{where}: quantization_config must be an object, got {raw!r:.80}.", param="quantization_config"
        )
    method = raw.get("quant_method")
    if method is None and "bits" in raw and "group_size" in raw:
        method = "mlx"
    if not isinstance(method, str) or method not in METHODS:
        raise ModelLoadError(
            f"{where}: checkpoints quantised by {method!r:.80} are not supported; supported: dfastllm, "
            f"{', '.join(METHODS)}.",
            param="quantization_config",
            hint="Load the original bfloat16 or float32 checkpoint, or quantise it with `dfastllm quantize`.",
        )
    return METHODS[method](raw, where)


def by_names(found: Mapping[str, Entry], where: Path) -> Method | None:
    """The method of a directory whose config.json says nothing of quantisation, by its tensors alone; None where they
    are floats. Raises CheckpointError for tensors of a method that needs its settings too."""
    ends = {name.rpartition(".")[2] for name in found}
    if "qweight" in ends:
        return _of_words(found, where)
    if any(name.endswith(bitsandbytes.STATES) for name in found) or "SCB" in ends:
        return bitsandbytes.Bitsandbytes("bitsandbytes")
    if torchao.QDATA in ends:
        return torchao.Torchao()
    needing = {
        "weight_packed": "compressed-tensors",
        "weight_scale_inv": "blocks of eight-bit floats",
        "weight_scale": "scaled weights",
        "biases": "MLX",
    }
    for end, method in needing.items():
        if end in ends:
            name = next(name for name in found if name.rpartition(".")[2] == end)
            raise CheckpointError(
                f"{found[name].file} holds {name}, as {method} has it, but config.json in {where} has no "
                f"quantization_config, which says how they are laid out.",
                hint="Take config.json from the same place as the weights.",
            )
    return None


def _of_words(found: Mapping[str, Entry], where: Path) -> Method:
    """GPTQ or AWQ, told apart by which side of qweight is packed: the bits and the group follow from the shapes."""
    name = next(name for name in found if name.endswith(".qweight"))
    owner = name.removesuffix("qweight")
    words, scales, zeros = (found.get(owner + part) for part in ("qweight", "scales", "qzeros"))
    if words is not None and scales is not None and zeros is not None and len(words.shape) == len(scales.shape) == 2:
        (rows, columns), (groups, n) = words.shape, scales.shape
        if columns == n and groups and len(zeros.shape) == 2 and zeros.shape[1]:
            bits = zeros.shape[1] * 32 // n
            if bits in gptq.BITS and rows * 32 // bits % groups == 0:
                return gptq.Gptq(bits, rows * 32 // bits // groups, 1)
        if columns * awq.EACH == n and groups and rows % groups == 0:
            return awq.Awq(rows // groups, "gemm")
    raise CheckpointError(
        f"{found[name].file} holds {name}, as GPTQ and AWQ have it, but config.json in {where} has no "
        "quantization_config, and the shapes beside it do not tell how it is laid out.",
        hint="Take config.json (or quantize_config.json) from the same place as the weights.",
    )
