"""adapter_config.json: what of it changes the mathematics, and refusal of what is not computed here.

A field of PEFT's LoraConfig is one of three kinds: read (LoraConfig below), without influence on a trained adapter's
result (`HARMLESS`), or one that asks for other mathematics. The last are fine at the value that switches them off; any
other value, and any field that is none of PEFT 0.21's, is refused by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

from dfastllm.core import value
from dfastllm.errors import AdapterError
from dfastllm.lora.patterns import Patterns

__all__ = ["CONFIG_FILE", "LoraConfig", "read_config"]

Bias = Literal["none", "all", "lora_only"]
CONFIG_FILE = "adapter_config.json"
MOST_BYTES = 1 << 20  # of the file; rank_pattern of a mixture's every expert takes some 100 kB
MOST_RANK = 1 << 20  # that a config may name; what is served has limits of its own
MOST_ALPHA = 1e9
BIASES = ("none", "all", "lora_only")

# Where the weights came from, how they were trained, and which modules were chosen: the tensors tell which these are.
HARMLESS = frozenset(
    {
        "alora_invocation_string",
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
        "target_modules",
        "target_parameters",
        "velora_config",
    }
)
# Fields that ask for other mathematics unless they are null, false or empty.
OTHER_MATHEMATICS = frozenset(
    {
        "alora_invocation_tokens",
        "arrow_config",
        "kasa_config",
        "layer_replication",
        "monteclora_config",
        "trainable_token_indices",
        "use_bdlora",
        "use_qalora",
    }
)
# Starts that leave the base as it is. The others (pissa, olora, corda, loftq, lora_ga) take the start off the base.
STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica", "true", "false")


@value(frozen=True, slots=True)
class LoraConfig:
    """What adapter_config.json says of how the tensors are to be used.

    rank, alpha      of a module without an entry in rank_pattern, alpha_pattern.
    rank_pattern,    module name, the end of one, or a regular expression for one -> its own.
    alpha_pattern
    rank_stabilised  the scale is alpha / sqrt(rank) instead of alpha / rank (Kalajdzievski 2023, arXiv 2312.03732).
    magnitudes       the adapter is DoRA: every linear has a magnitude vector.
    bias             which biases of the base were trained too.
    columns_first    the base's layers hold [in, out] (GPT-2); without influence on models of linears [out, in].
    lora_bias        B has a bias of its own.
    saved            modules that were trained whole (modules_to_save).
    tied             the embedding's adapter is the head's too (ensure_weight_tying).
    base             what the adapter was trained for, by its own word.
    """

    rank: int
    alpha: float
    rank_pattern: Patterns[int]
    alpha_pattern: Patterns[float]
    rank_stabilised: bool = False
    magnitudes: bool = False
    bias: Bias = "none"
    columns_first: bool = False
    lora_bias: bool = False
    saved: tuple[str, ...] = ()
    tied: bool = False
    base: str = ""

    def rank_of(self, module: str) -> int:
        """Of a module by its published name."""
        return self.rank_pattern.of(module, self.rank)

    def scale_of(self, module: str) -> float:
        """What a module's B A is multiplied by."""
        rank = self.rank_of(module)
        return self.alpha_pattern.of(module, self.alpha) / (math.sqrt(rank) if self.rank_stabilised else rank)


def read_config(directory: Path) -> LoraConfig:
    """adapter_config.json of a directory. Raises AdapterError naming the field, what it holds and what is wanted."""
    path = directory / CONFIG_FILE
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for, a device read without end
            raise AdapterError(f"{path} is no file.")
        with path.open("rb") as file:
            text = file.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise AdapterError(f"{path} has more than {MOST_BYTES:,} bytes.")
        raw = json.loads(text.decode("utf-8-sig"))
    except FileNotFoundError:
        raise AdapterError(
            f"{CONFIG_FILE} is missing in {directory}.", hint="Give the directory that PEFT's save_pretrained wrote."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(raw, dict):
        raise AdapterError(f"{path} must hold a JSON object, got {type(raw).__name__}.")
    return _Fields(raw, path).config()


class _Fields:
    """The parsed file with typed reads."""

    def __init__(self, raw: Mapping[str, Any], path: Path) -> None:
        self.raw = raw
        self.path = path

    def config(self) -> LoraConfig:
        kind = self.raw.get("peft_type")
        if kind != "LORA":
            raise self._wrong("peft_type", "LORA")
        self._refuse()
        bias = self.raw.get("bias") or "none"
        if bias not in BIASES:
            raise self._wrong("bias", " or ".join(BIASES))
        saved = self.raw.get("modules_to_save") or []
        if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
            raise self._wrong("modules_to_save", "a list of module names")
        ranks, alphas = self._patterns("rank_pattern"), self._patterns("alpha_pattern")
        if not all(_is_rank(rank) for rank in ranks.values.values()):
            raise self._wrong("rank_pattern", f"whole ranks of 1 to {MOST_RANK:,}")
        return LoraConfig(
            rank=self._rank(),
            alpha=self._alpha(),
            rank_pattern=Patterns({name: int(rank) for name, rank in ranks.values.items()}),
            alpha_pattern=alphas,
            rank_stabilised=self._flag("use_rslora"),
            magnitudes=self._flag("use_dora"),
            bias=cast(Bias, bias),
            columns_first=self._flag("fan_in_fan_out"),
            lora_bias=self._flag("lora_bias"),
            saved=tuple(saved),
            tied=self._flag("ensure_weight_tying"),
            base=str(self.raw.get("base_model_name_or_path") or ""),
        )

    def _refuse(self) -> None:
        """Raises AdapterError for a field of other mathematics that is switched on, or an unknown one."""
        for name, held in self.raw.items():
            if name in OTHER_MATHEMATICS and held:
                raise AdapterError(
                    f"{self.path}: {name} = {held!r:.80} asks for other mathematics than LoRA, DoRA and "
                    "rank-stabilised LoRA, which is not computed here.",
                    param=name,
                    hint="Merge the adapter into its model, or train it without.",
                )
            if name not in KNOWN and held not in (None, False, "", [], {}):
                raise AdapterError(
                    f"{self.path}: {name} = {held!r:.80} is unknown and may change what is computed.",
                    param=name,
                    hint="Remove it if it does not.",
                )
        start = self.raw.get("init_lora_weights")
        if start not in STARTS and not (isinstance(start, str) and start.lower() in STARTS):
            raise AdapterError(
                f"{self.path}: init_lora_weights = {start!r:.40} has changed the base's own weights.",
                param="init_lora_weights",
                hint="Save it with PEFT's path_initial_model_for_weight_conversion, which makes a plain adapter of it.",
            )

    def _wrong(self, name: str, wanted: str) -> AdapterError:
        return AdapterError(f"{self.path}: {name} must be {wanted}, got {self.raw.get(name)!r:.80}.", param=name)

    def _flag(self, name: str) -> bool:
        held = self.raw.get(name)
        if held is not None and not isinstance(held, bool):
            raise self._wrong(name, "true or false")
        return bool(held)

    def _rank(self) -> int:
        held = self.raw.get("r", 8)
        if not _is_rank(held):
            raise self._wrong("r", f"a whole number of 1 to {MOST_RANK:,}")
        return int(held)

    def _alpha(self) -> float:
        held = self.raw.get("lora_alpha", 8)
        if not _is_number(held):
            raise self._wrong("lora_alpha", f"a number of at most {MOST_ALPHA:,.0f}")
        return float(held)

    def _patterns(self, name: str) -> Patterns[float]:
        held = self.raw.get(name) or {}
        if not isinstance(held, dict) or not all(_is_number(found) for found in held.values()):
            raise self._wrong(name, "an object of module names and numbers")
        try:
            return Patterns({pattern: float(found) for pattern, found in held.items()})
        except ValueError as error:
            raise AdapterError(
                f"{self.path}: {name}: {error}.", param=name, hint="Name the modules in full, without wildcards."
            ) from error


def _is_number(held: Any) -> bool:
    """Whether it is a number that a scale can be made of. A whole one may have any number of digits in JSON."""
    return isinstance(held, int | float) and not isinstance(held, bool) and -MOST_ALPHA <= held <= MOST_ALPHA


def _is_rank(held: Any) -> bool:
    return _is_number(held) and 1 <= held <= MOST_RANK and held == int(held)


KNOWN = (
    HARMLESS
    | OTHER_MATHEMATICS
    | {
        "alpha_pattern",
        "bias",
        "ensure_weight_tying",
        "fan_in_fan_out",
        "init_lora_weights",
        "lora_alpha",
        "lora_bias",
        "modules_to_save",
        "peft_type",
        "r",
        "rank_pattern",
        "use_dora",
        "use_rslora",
    }
)
