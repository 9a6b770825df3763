"""Layer by layer over a checkpoint that need not fit into memory: run the calibration rows through a layer, quantise
it, run them again through what it has become, go on with those outputs. One layer's weights are in memory at a time,
beside the hidden states of the calibration rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from dfastllm.convert.source import Source
from dfastllm.kernels.packed import QTensor
from dfastllm.models.checkpoint import skeleton
from dfastllm.models.decoder import Decoder
from dfastllm.quant.calibrate import InputStatistics, recording
from dfastllm.quant.formats import require_finite
from dfastllm.train.objectives import Rows, short_attention

__all__ = ["Quantise", "walk"]

GRAM_BYTES = 1 << 30  # gram matrices held at once; a layer with more of them is run again for the next

# (own name, weight, what its inputs looked like; None: never used) -> what is written
Quantise = Callable[[str, Tensor, InputStatistics | None], QTensor | Tensor]


def walk(
    source: Source, rows: Sequence[Rows], quantise: Quantise, *, gram: bool
) -> Iterator[tuple[str, QTensor | Tensor]]:
    """(own name, weight as written) of every parameter, embedding and head last."""
    model = skeleton(source.config, source.info, torch.float32)
    embedding = source.tensor("embed.weight")  # as stored: often the largest tensor there is
    require_finite(embedding, source.published("embed.weight"))
    hidden = [embedding[r.ids].float() * model.program.embed_factor for r in rows]
    del embedding
    for i, layer in enumerate(model.layers):
        prefix = f"layers.{i}."
        source.fill(layer, prefix)
        linears = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
        original = {name: module.weight.data for name, module in linears.items()}
        for names in _passes(linears, gram):
            # Statistics of every pass come from the float layer: what was quantised before is put back at the end.
            with recording({name: linears[name] for name in names}, gram=gram) as found:
                for r, x in zip(rows, hidden, strict=True):
                    _run(model, layer, r, x)
            done = {name: quantise(f"{prefix}{name}.weight", original[name], found.get(name)) for name in names}
            for name, weight in done.items():
                original[name] = weight.dequantise() if isinstance(weight, QTensor) else weight.float()
                yield f"{prefix}{name}.weight", weight
            del found, done
        for name, module in linears.items():
            module.weight = nn.Parameter(original[name], requires_grad=False)
        matrices = {f"{name}.weight" for name in linears}
        for name, _ in layer.named_parameters():
            if name not in matrices:
                yield prefix + name, source.tensor(prefix + name)
        hidden = [_run(model, layer, r, x) for r, x in zip(rows, hidden, strict=True)]
        layer.to_empty(device="meta")
    source.fill(model.norm, "norm.")
    yield "norm.weight", source.tensor("norm.weight")
    head = InputStatistics.empty(source.config.hidden_size, gram=gram)
    for r, x in zip(rows, hidden, strict=True):
        head.add(model.norm(x[r.wanted]))
    if source.config.tied:
        yield "embed.weight", quantise("embed.weight", source.tensor("embed.weight"), head)
        return
    yield "lm_head.weight", quantise("lm_head.weight", source.tensor("lm_head.weight"), head)
    # Rows of an embedding are looked up, not multiplied: no inputs to weigh by.
    yield "embed.weight", quantise("embed.weight", source.tensor("embed.weight"), None)


@torch.inference_mode()
def _run(model: Decoder, layer: nn.Module, rows: Rows, x: Tensor) -> Tensor:
    return layer(x, model.angles(rows.positions), short_attention(rows))  # type: ignore[no-any-return]


def _passes(linears: dict[str, nn.Linear], gram: bool) -> list[list[str]]:
    """Names in groups whose gram matrices fit into GRAM_BYTES; one group without them."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, module in linears.items():
        need = 4 * module.in_features**2 if gram else 0
        if groups[-1] and size + need > GRAM_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += need
    return groups
