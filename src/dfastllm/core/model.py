"""What a model can do, as data. Everything asks this, never a model's name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["Confidence", "Kind", "ModelInfo"]

Kind = Literal["ar", "diffusion", "block"]
Confidence = Literal["raw", "drawn", "filtered"]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Capabilities of a built model.

    kind       ar: causal; diffusion: full attention over a masked canvas; block: block-causal with exact K,V.
    shift      1: the row of position i-1 predicts position i (Dream, Fast-dLLM v2); 0: row i predicts i.
    block      native block length (kind "block"), else 0.
    ar_first   the first token of a block comes from the row before it as in autoregression (Fast-dLLM v2).
    edit       the model was trained to overwrite committed tokens (LLaDA2.1).
    causal     a model of another kind than ar whose weights are an autoregressive model's too: under causal attention
               the row of position i-1 predicts position i (Fast-dLLM v2).
    confidence what a canvas decoder takes for the probability of a candidate (and its entropy and margin), as the
               family's published code does. raw: the softmax of the logits, whatever temperature and filters the
               token is drawn with (LLaDA). drawn: the distribution the token is drawn from, after temperature, top_k
               and top_p (SDAR, LLaDA2, Fast-dLLM v2). filtered: as drawn, and top_k and top_p cut it at temperature 0
               too (Dream).
    eos_ids    any of them ends a text; the first is the one padding is counted as.
    defaults   what the model's generation_config.json says of options that a request does not give, by name.
    notes      what its files say that was passed over or read in another way than they say it, a sentence each.
    """

    name: str
    family: str
    kind: Kind
    vocab_size: int
    max_len: int
    layers: int
    kv_heads: int
    head_dim: int
    eos_ids: tuple[int, ...]
    mask_id: int | None = None
    bos_id: int | None = None
    pad_id: int | None = None
    shift: int = 0
    block: int = 0
    ar_first: bool = False
    edit: bool = False
    causal: bool = False
    confidence: Confidence = "raw"
    defaults: Mapping[str, Any] = field(default_factory=dict, hash=False)
    notes: tuple[str, ...] = field(default=(), compare=False)
