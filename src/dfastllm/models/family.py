"""Families: how a published model describes itself (config.json, tensor names, token ids) in the terms of one decoder.

A wiring file (llama, llada, dream, blockdiff, moe, gemma) declares `Family` values with `register` and `variant`;
everything else asks the registry. A family is data and a few functions, never a subclass: the module tree is always
`Decoder`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from dfastllm.core import Confidence, Kind, ModelInfo
from dfastllm.errors import ModelLoadError, ValidationError
from dfastllm.models.config import DecoderConfig
from dfastllm.models.program import Program, standard

__all__ = [
    "FAMILIES",
    "GGUF_NAMES",
    "Family",
    "Fields",
    "Gguf",
    "Ids",
    "NameTable",
    "describe",
    "family_of",
    "family_of_gguf",
    "find_family",
    "register",
    "require_expressible",
    "sums_of",
    "variant",
]

T = TypeVar("T")


class Fields:
    """A parsed config.json with typed reads; every failure is a ModelLoadError naming the field, what it holds and what
    was wanted. Null counts as absent."""

    def __init__(self, raw: Mapping[str, Any], where: str = "config.json") -> None:
        self.raw = raw
        self.where = where

    def get(self, name: str, wanted: type[T], default: T | None = None) -> T:
        """The first of the `|`-separated field names that is present, as `wanted` (an int passes for a float)."""
        for key in name.split("|"):
            value = self.raw.get(key)
            if value is None:
                continue
            if wanted is float and isinstance(value, int) and not isinstance(value, bool):
                value = float(value) if abs(value) < 1 << 1000 else math.inf
            if wanted is float and isinstance(value, float) and not math.isfinite(value):
                raise ModelLoadError(f"{self.where}: field {key!r} must be a finite number, got {value}.", param=key)
            if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
                raise ModelLoadError(
                    f"{self.where}: field {key!r} must be {wanted.__name__}, got {value!r:.200}.", param=key
                )
            return value
        if default is None:
            raise ModelLoadError(f"{self.where}: field {name.replace('|', ' or ')!r} is missing.", param=name)
        return default

    def has(self, name: str) -> bool:
        return self.raw.get(name) is not None

    def only(self, **values: Any) -> None:
        """Refuse a model that switches on something this decoder does not compute: each field, where present, must have
        the given value (or one of the given tuple)."""
        for name, allowed in values.items():
            options = allowed if isinstance(allowed, tuple) else (allowed,)
            got = self.raw.get(name)
            if got is not None and got not in options:
                wanted = " or ".join(repr(option) for option in options)
                raise ModelLoadError(f"{self.where}: {name}={got!r} is not supported; supported: {wanted}.", param=name)


@contextmanager
def sums_of(where: str) -> Iterator[None]:
    """Around what a family computes of the numbers in a file: where they cannot be computed with (a division by zero, a
    root of a negative number), the error is a ModelLoadError that names the file."""
    try:
        yield
    except ValidationError as error:
        raise ModelLoadError(f"{where}: {error}", param=error.param) from error
    except (ArithmeticError, TypeError, ValueError) as error:
        raise ModelLoadError(
            f"{where} has numbers that describe no model: {type(error).__name__}: {error!s:.200}.",
            hint="The file is damaged: download it again.",
        ) from error


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class NameTable:
    """Bijection between parameter names of `Decoder` and published tensor names.

    Rules are module patterns with {i} for the layer and {j} for the expert, e.g. "layers.{i}.attn.q_proj" ->
    "model.layers.{i}.self_attn.q_proj"; the parameter's own name (weight, bias) is kept, unless a rule names the whole
    parameter.
    """

    def __init__(self, rules: Mapping[str, str]) -> None:
        self.rules = dict(rules)
        self._back = {published: own for own, published in rules.items()}
        if len(self._back) != len(self.rules):
            raise ValueError("two rules of a name table give the same published name")

    def published(self, own: str) -> str:
        """KeyError for a name that no rule covers."""
        return self._map(own, self.rules)

    def own(self, published: str) -> str:
        """KeyError for a name that no rule covers."""
        return self._map(published, self._back)

    @staticmethod
    def _map(name: str, rules: Mapping[str, str]) -> str:
        numbers = _NUMBER.findall(name)
        if len(numbers) > 2:
            raise KeyError(name)
        marks = iter(("{i}", "{j}"))
        pattern = _NUMBER.sub(lambda _: next(marks), name)
        if pattern in rules:
            found = rules[pattern]
        else:
            module, _, parameter = pattern.rpartition(".")
            if module not in rules:
                raise KeyError(name)
            found = f"{rules[module]}.{parameter}"
        return found.format(**dict(zip("ij", numbers, strict=False)))


@dataclass(frozen=True, slots=True)
class Ids:
    """Token ids of a model, as far as known."""

    eos: tuple[int, ...] = ()
    mask: int | None = None
    bos: int | None = None
    pad: int | None = None


@dataclass(frozen=True)
class Family:
    """One published wiring.

    read     config.json -> shape. write: shape and capabilities -> the fields of config.json (without the token ids and
             `architectures`, `model_type`, which `checkpoint` adds).
    names    the published tensor names.
    program  shape -> wiring.
    gguf     how llama.cpp's files hold it; None: there is no such architecture.
    kind, shift, ar_first, causal, confidence: see core.ModelInfo.
    block    (field of config.json, fallback) of the native block.
    ids      used where the model's own files say nothing. end_tokens, mask_tokens: contents of added tokens of the
             tokenizer that also end a text, or are the mask.
    harmless patterns (re.fullmatch) of tensors that may be in a file and are not parameters.
    own_head a stored head counts although the config ties it to the embedding, where its numbers are others.
    shape    fields of DecoderConfig that every model of this wiring has, or how they follow from the other fields.
    """

    name: str
    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    names: NameTable
    read: Callable[[Fields], DecoderConfig]
    write: Callable[[DecoderConfig], dict[str, Any]]
    program: Callable[[DecoderConfig], Program] = standard
    gguf: Gguf | None = None
    kind: Kind = "ar"
    shift: int = 0
    ar_first: bool = False
    causal: bool = False
    confidence: Confidence = "raw"
    block: tuple[str, int] | None = None
    ids: Ids = Ids()
    end_tokens: tuple[str, ...] = ()
    mask_tokens: tuple[str, ...] = ()
    harmless: tuple[str, ...] = (r".*\.rotary_emb\.inv_freq",)
    own_head: bool = True
    shape: Mapping[str, Any] = field(default_factory=dict)


_BLK = "blk.{i}"
GGUF_NAMES = {
    "embed": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "layers.{i}.attn_norm": f"{_BLK}.attn_norm",
    "layers.{i}.attn.q_proj": f"{_BLK}.attn_q",
    "layers.{i}.attn.k_proj": f"{_BLK}.attn_k",
    "layers.{i}.attn.v_proj": f"{_BLK}.attn_v",
    "layers.{i}.attn.qkv_proj": f"{_BLK}.attn_qkv",
    "layers.{i}.attn.o_proj": f"{_BLK}.attn_output",
    "layers.{i}.attn.q_norm": f"{_BLK}.attn_q_norm",
    "layers.{i}.attn.k_norm": f"{_BLK}.attn_k_norm",
    "layers.{i}.attn_post_norm": f"{_BLK}.post_attention_norm",
    "layers.{i}.mlp_norm": f"{_BLK}.ffn_norm",
    "layers.{i}.mlp.gate_proj": f"{_BLK}.ffn_gate",
    "layers.{i}.mlp.up_proj": f"{_BLK}.ffn_up",
    "layers.{i}.mlp.down_proj": f"{_BLK}.ffn_down",
    "layers.{i}.mlp_post_norm": f"{_BLK}.post_ffw_norm",
    # Mixtures: one tensor [experts, out, in] holds all experts of a layer.
    "layers.{i}.mlp.router": f"{_BLK}.ffn_gate_inp",
    "layers.{i}.mlp.experts.{j}.gate_proj": f"{_BLK}.ffn_gate_exps",
    "layers.{i}.mlp.experts.{j}.up_proj": f"{_BLK}.ffn_up_exps",
    "layers.{i}.mlp.experts.{j}.down_proj": f"{_BLK}.ffn_down_exps",
}


@dataclass(frozen=True)
class Gguf:
    """How llama.cpp's files hold a family. Its norms whose weights are distances from 1 are stored with the 1 added.

    arch         general.architecture; several families may share one, the first registered reads it.
    names        tensor names.
    interleaved  q and k rows are ordered for rotary pairs of neighbours (2 i, 2 i + 1), not (i, i + half).
    fields       fields of DecoderConfig that a file of this architecture can say beside sizes, theta, eps and tied; a
                 model with another value than the default in any other field cannot be written.
    scalings     kinds of rotary scaling it computes.
    free_dim     head_dim need not be hidden_size / heads.
    read         (metadata without the architecture's prefix, config so far) -> config. write: config -> metadata beside
                 what every architecture has, without the prefix.
    """

    arch: str
    names: NameTable = field(default_factory=lambda: NameTable(GGUF_NAMES))
    interleaved: bool = False
    fields: frozenset[str] = frozenset()
    scalings: tuple[str, ...] = ("linear", "yarn")
    free_dim: bool = True
    read: Callable[[Fields, DecoderConfig], DecoderConfig] = lambda fields, config: config
    write: Callable[[DecoderConfig], dict[str, Any]] = lambda config: {}


FAMILIES: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Add to the registry; ValueError if its name is taken."""
    if family.name in FAMILIES:
        raise ValueError(f"family {family.name!r} is registered twice")
    FAMILIES[family.name] = family
    return family


def variant(of: Family, name: str, *architectures: str, **changes: Any) -> Family:
    """Register a family that is `of` but for its names and these fields; its one model_type is `name` unless said."""
    own = {"name": name, "architectures": architectures, "model_types": (name,)}
    return register(replace(of, **{**own, **changes}))


def find_family(name: str) -> Family:
    """By registered name. Raises ModelLoadError listing the families there are."""
    if name not in FAMILIES:
        raise ModelLoadError(f"unknown model family {name!r}; known: {', '.join(sorted(FAMILIES))}.", param="family")
    return FAMILIES[name]


def family_of(fields: Fields) -> Family:
    """The family of a config.json: by `architectures` (several families share a model_type), else by `model_type`.
    Raises ModelLoadError naming both."""
    architectures = fields.get("architectures", list, [])
    model_type = fields.raw.get("model_type")
    for family in FAMILIES.values():
        if any(name in family.architectures for name in architectures):
            return family
    for family in FAMILIES.values():
        if not architectures and model_type in family.model_types:
            return family
    raise ModelLoadError(
        f"{fields.where}: no supported family for architectures={architectures}, model_type={model_type!r}; "
        f"supported: {', '.join(sorted(FAMILIES))}.",
        param="architectures",
    )


def family_of_gguf(arch: str, where: str) -> tuple[Family, Gguf]:
    """The family that reads GGUF files of this architecture, and how. Raises ModelLoadError listing those there are."""
    known = {family.gguf.arch: (family, family.gguf) for family in reversed(FAMILIES.values()) if family.gguf}
    if arch not in known:
        raise ModelLoadError(
            f"{where}: GGUF architecture {arch!r} is not supported; supported: {', '.join(sorted(known))}.",
            param="general.architecture",
        )
    return known[arch]


def require_expressible(family: Family, config: DecoderConfig) -> None:
    """Raise ValidationError unless the family's config.json can say this shape, so that it reads back the same."""
    back = family.read(Fields(family.write(config)))
    names = DecoderConfig.__dataclass_fields__
    differing = [name for name in names if getattr(back, name) != getattr(config, name)]
    if differing:
        shown = ", ".join(f"{n}={getattr(config, n)!r} (it would read {getattr(back, n)!r})" for n in differing)
        raise ValidationError(f"family {family.name} cannot have {shown}.", param=differing[0])


def describe(
    family: str,
    config: DecoderConfig,
    ids: Ids,
    *,
    name: str = "",
    block: int | None = None,
    edit: bool = False,
) -> ModelInfo:
    """Capabilities of a model of this family and shape. `block` None: the family's native block. Raises ModelLoadError
    for a family that needs a mask id and has none, an id outside the vocabulary, and a window under other attention
    than causal."""
    found = find_family(family)
    if found.kind != "ar" and config.window:
        raise ModelLoadError(
            f"{family}: a sliding window of {config.window} is computed for autoregressive models only; this one is of "
            f"kind {found.kind}.",
            param="sliding_window",
        )
    if found.kind != "ar" and ids.mask is None:
        raise ModelLoadError(
            f"{family} needs a mask token id and none is known.",
            hint="Set mask_token_id in config.json; in a GGUF file it is tokenizer.ggml.mask_token_id.",
            param="mask_token_id",
        )
    for label, token in [("mask", ids.mask), ("bos", ids.bos), ("pad", ids.pad), *(("eos", e) for e in ids.eos)]:
        if token is not None and not 0 <= token < config.vocab_size:
            raise ModelLoadError(
                f"{label} token id {token} is outside the vocabulary of {config.vocab_size} embedding rows."
            )
    native = found.block[1] if found.block else 0
    return ModelInfo(
        name=name or family,
        family=family,
        kind=found.kind,
        vocab_size=config.vocab_size,
        max_len=config.max_len,
        layers=config.layers,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        eos_ids=ids.eos,
        mask_id=ids.mask,
        bos_id=ids.bos,
        pad_id=ids.pad,
        shift=found.shift,
        block=native if block is None else block,
        ar_first=found.ar_first,
        causal=found.causal,
        confidence=found.confidence,
        edit=edit,
    )
