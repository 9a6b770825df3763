"""The tensors of a published checkpoint as those of its quantised modules, and what is said where one does not fit.

Knows no method: each says which tensors belong to a module, and what shapes they have.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dfastllm.errors import CheckpointError, ModelLoadError
from dfastllm.quant.stream import Entry, read_tensor

__all__ = ["FLOATS", "Parts", "collect", "fields", "matches", "option", "pattern_of", "refuse_option"]

FLOATS = ("F32", "F16", "BF16")
PARAM = "quantization_config"
# Static scales of attention's K, V, queries and weights: those are rounded here as they come.
OF_ATTENTION = (".k_scale", ".v_scale", ".q_scale", ".kv_scale", ".prob_scale")
REPETITIONS = 4
LONGEST = 200  # characters of a pattern, and of a name that one is held against
_LISTED = 12  # values of an option that are shown at most


@dataclass(frozen=True, slots=True)
class Parts:
    """The tensors of one module.

    method   what quantised it, for messages.
    owner    the module's published name.
    entries  the rest of a tensor's name -> where it lies.
    """

    method: str
    owner: str
    entries: Mapping[str, Entry]

    def has(self, part: str) -> bool:
        return part in self.entries

    def where(self, part: str) -> str:
        """The file and the tensor."""
        return f"{self.entries[part].file}: tensor {self.owner}.{part}"

    def fault(self, part: str, wanted: str, hint: str = "") -> CheckpointError:
        """The error for a part that is not what its method says."""
        entry = self.entries.get(part)
        if entry is None:
            other = next(iter(self.entries.values()))
            found = ", ".join(f"{name} {entry.dtype} {list(entry.shape)}" for name, entry in self.entries.items())
            text = f"{other.file}: tensor {self.owner}.{part} is missing; {self.method} wants {wanted} beside {found}."
        else:
            text = f"{self.where(part)} is {entry.dtype} {list(entry.shape)}; {self.method} wants {wanted}."
        damaged = "The file is damaged, or made with other settings than config.json says; load another copy."
        return CheckpointError(text, hint=hint or damaged)

    def entry(self, part: str, dtypes: Collection[str], shape: tuple[int | None, ...] | None = None) -> Entry:
        """One part, which must be of one of these dtypes and of this shape (None: any length). Raises
        CheckpointError."""
        wanted = " or ".join(dtypes) + ("" if shape is None else f" {[n if n is not None else '...' for n in shape]}")
        entry = self.entries.get(part)
        if entry is None or entry.dtype not in dtypes:
            raise self.fault(part, wanted)
        if shape is not None:
            fits = len(entry.shape) == len(shape) and all(
                n is None or n == m for n, m in zip(shape, entry.shape, strict=True)
            )
            if not fits:
                raise self.fault(part, wanted)
        return entry

    def read(self, part: str) -> Tensor:
        """The tensor itself, unsigned words of 32 bits as signed ones of the same bits."""
        value = read_tensor(self.entries[part], f"{self.owner}.{part}")
        return value.view(torch.int32) if value.dtype == torch.uint32 else value


def collect(
    found: Mapping[str, Entry], method: str, parts: Iterable[str], marks: Collection[str]
) -> tuple[dict[str, Parts], dict[str, Entry]]:
    """(the modules that have a tensor of one of `marks`, with all of their `parts`; the tensors of no such module).
    parts, marks: ends of names. Static scales of attention are in neither."""
    owners: dict[str, dict[str, Entry]] = {}
    longest = sorted(parts, key=len, reverse=True)
    marked: dict[str, None] = {}
    for name, entry in found.items():
        end = next((part for part in longest if name.endswith(f".{part}")), None)
        if end is not None:
            owner = name[: -len(end) - 1]
            owners.setdefault(owner, {})[end] = entry
            if end in marks:
                marked[owner] = None
    taken = {f"{owner}.{part}" for owner in marked for part in owners[owner]}
    rest = {name: entry for name, entry in found.items() if name not in taken and not name.endswith(OF_ATTENTION)}
    return {owner: Parts(method, owner, owners[owner]) for owner in marked}, rest


def fields(words: Tensor, bits: int, count: int) -> Tensor:
    """Numbers of `bits` bits packed along the last dim of int32 words, lowest bits first and without gaps: int32
    [..., words] -> uint8 [..., count]."""
    raw: Tensor = words.contiguous().view(torch.uint8)  # little-endian bytes
    if bits == 8:
        return raw[..., :count]
    if bits == 4:  # both halves of a byte as the two bytes of a wider number
        wide = raw.to(torch.int16)
        return ((wide | wide << 4) & 0x0F0F).view(torch.uint8)[..., :count]
    if bits == 2:
        wide = raw.to(torch.int32)
        return ((wide | wide << 6 | wide << 12 | wide << 18) & 0x03030303).view(torch.uint8)[..., :count]
    # Eight numbers lie in `bits` whole bytes.
    pad = -raw.shape[-1] % bits
    if pad:
        raw = torch.cat([raw, raw.new_zeros(*raw.shape[:-1], pad)], dim=-1)
    whole = raw.view(*raw.shape[:-1], -1, bits).to(torch.int64)
    joined = (whole << torch.arange(0, 8 * bits, 8)).sum(dim=-1)
    numbers: Tensor = (joined[..., None] >> torch.arange(0, 8 * bits, bits)) & (2**bits - 1)
    return numbers.to(torch.uint8).flatten(-2)[..., :count]


def pattern_of(text: str, name: str, where: str) -> str:
    """A pattern of module names that a configuration brings, which must be a regular expression whose matching takes
    no long time: at most four repetitions, and none of them inside of another. Raises ModelLoadError."""
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise refuse_option(name, where, text, f"regular expressions ({error})") from error
    inside, nested = [0], False
    plain = re.sub(r"\\.|\[[^\]]*\]", "x", text)  # what is escaped or of a class repeats nothing
    for at, character in enumerate(plain):
        repeated = plain[at + 1 : at + 2] in ("*", "+", "{")
        if character == "(":
            inside.append(0)
        elif character == ")" and len(inside) > 1:
            within = inside.pop()
            nested |= repeated and within > 0
            inside[-1] += within
        elif character in "*+{":
            inside[-1] += 1
    if nested or sum(inside) > REPETITIONS or len(text) > LONGEST:
        raise refuse_option(name, where, text, f"patterns of at most {REPETITIONS} repetitions, none inside another")
    return text


def matches(pattern: str, owner: str) -> bool:
    """Whether a module's name begins as this pattern says; longer ones than any model has do not."""
    return len(owner) <= LONGEST and re.match(pattern, owner) is not None


def option(raw: Mapping[str, Any], name: str, where: str, allowed: Collection[Any], default: Any = None) -> Any:
    """A field of quantization_config, which must be one of `allowed`; absent or null: the default. Raises
    ModelLoadError naming file, field, value and what there is."""
    value = raw.get(name)
    value = default if value is None else value
    if not any(type(value) is type(one) and value == one for one in allowed):
        raise refuse_option(name, where, value, " or ".join(repr(one) for one in list(allowed)[:_LISTED]))
    return value


def refuse_option(name: str, where: str, value: object, wanted: str) -> ModelLoadError:
    """The error for a field of quantization_config that is not supported."""
    return ModelLoadError(
        f"{where}: quantization_config.{name} is {value!r:.120}; supported: {wanted}.",
        param=PARAM,
        hint="Load the original bfloat16 or float32 checkpoint, and quantise it with `dfastllm quantize`.",
    )
