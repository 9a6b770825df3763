"""`python -m dfastllm.decode` prints docs/decoders.md: every rule and cache with its options, from the tables they run
by."""

from __future__ import annotations

from collections.abc import Mapping

from dfastllm.decode.canvas.layout import CACHES
from dfastllm.decode.canvas.rules import RULES, Option

__all__ = ["reference"]

HEAD = """# Decoders

Made by `python -m dfastllm.decode > docs/decoders.md`; a test fails when it is stale.

An autoregressive model decodes with `ar` (greedy or sampled). A masked-diffusion model decodes with any rule and any
cache below; a block-diffusion model with any rule, over exact K,V. In the HTTP API a rule is chosen by `rule` (or by
sending `threshold` or `factor`) and its options by `rule_options`; in Python by `DecodeParams(rule=..., options=...)`;
on the command line by `--rule` and `--options`.
"""


def reference() -> str:
    """The reference page, as Markdown."""
    lines = [HEAD, "## Rules: which masked positions a step commits", ""]
    for rule in RULES.values():
        lines += [f"### `{rule.name}`", "", f"{rule.help[0].upper()}{rule.help[1:]}.", "", *_options(rule.options)]
    lines += ["## Caches: what is not computed again", ""]
    for name, options in CACHES.items():
        lines += [f"### `{name}`", "", f"{_CACHE_TEXT[name]}", "", *_options(options)]
    return "\n".join(lines).rstrip() + "\n"


_CACHE_TEXT = {
    "none": "Every step runs the whole sequence. The reference.",
    "prefix": "A full forward at each block start; steps run from the block's start to the end. Approximate.",
    "dual": "A full forward at each block start; steps run the block alone, its K,V replaced in place. Approximate.",
    "windowed": "As dual, with the neighbourhood of the block, and refreshed more often. Approximate.",
}


def _options(options: Mapping[str, Option]) -> list[str]:
    if not options:
        return []
    rows = [f"| `{name}` | {option.default} | {_range(option)} | {option.help} |" for name, option in options.items()]
    return ["| option | default | range | |", "|---|---|---|---|", *rows, ""]


def _range(option: Option) -> str:
    if option.choices:
        return ", ".join(option.choices)
    return f"{option.low:g} to {option.high:g}" if option.high != float("inf") else f"at least {option.low:g}"


if __name__ == "__main__":
    print(reference(), end="")
