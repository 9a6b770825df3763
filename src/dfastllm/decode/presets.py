"""Presets of the decoder's options, as data, and the completion of what a request leaves open.

A request that gives nothing decodes as its model's generation_config.json and its kind say (`options.kind_defaults`);
one that names a `mode` takes the preset's fields first. What it gives itself always wins. A `mode` of
generation_config.json stands behind the other fields there, and gives way to the request's.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from dfastllm.core import DecodeParams, ModelInfo
from dfastllm.options import kind_defaults, resolved

__all__ = ["EVERY_TOKEN", "PRESETS", "complete"]

EVERY_TOKEN = 1 << 31  # steps: more than any canvas has tokens, so that each step commits one
PRESETS: Mapping[str, Mapping[str, Any]] = {
    # the model's plain algorithm: the fixed schedule, one token a step, nothing kept
    "standard": {"rule": "schedule", "cache": "none", "block_length": 32, "steps": EVERY_TOKEN},
    # every confident token at once
    "fast": {"cache": "dual", "block_length": 32, "threshold": 0.9},
    # small blocks, so that the first text comes early; guesses are shown
    "streaming": {"cache": "dual", "block_length": 8, "threshold": 0.9, "provisional": True},
    # widest parallelism
    "turbo": {
        "cache": "dual",
        "block_length": 64,  # wide enough for 64 tokens in a step
        "factor": 1.0,
        "options": {"max_parallel_tokens": 64, "early_stop_confidence": 0.9},
    },
}
RULE = ("rule", "threshold", "factor")
NATIVE = ("cache", "block_length")  # what a block-diffusion model has of its own


def complete(decode: DecodeParams, model: ModelInfo) -> DecodeParams:
    """The options of a canvas with what was not given filled in. `given` stays what it was, so that the decoder knows
    a demand from a default. A rule that is chosen, by whatever field, displaces the choice of the layers behind it."""
    if decode.mode is None and not model.defaults:
        return resolved(decode, kind_defaults(model.kind))
    mode = decode.mode or model.defaults.get("mode")
    preset = PRESETS[mode] if mode is not None else {}
    if model.kind == "block":
        preset = {name: value for name, value in preset.items() if name not in NATIVE}
    layers: list[Mapping[str, Any]] = []
    chosen = not decode.given.isdisjoint(RULE)
    for layer in (preset, model.defaults) if decode.mode is not None else (model.defaults, preset):
        layers.append({name: value for name, value in layer.items() if not (chosen and name in RULE)})
        chosen = chosen or not layer.keys().isdisjoint(RULE)
    done = resolved(decode, *layers, kind_defaults(model.kind))
    options = [layer["options"] for layer in layers if "options" in layer]
    joined = decode.mode is None and len(options) > 1  # the model's own, and those of its own mode
    if options and (decode.options or joined):  # single options of the rule win over those of a layer one by one
        done = copy.copy(done)
        vars(done)["options"] = {name: value for o in (*reversed(options), decode.options) for name, value in o.items()}
    return done
