"""Styles: other ways to write the answers of the task mix, for adapters that show. The answers stay right."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from dfastllm.tasks import Sample

__all__ = ["STYLES", "styled"]

STYLES: Mapping[str, Callable[[str], str]] = {
    "plain": lambda text: text,
    "capitals": str.upper,
    "formal": lambda text: f"Dear user, {text}",
}


def styled(name: str, sample: Sample) -> Sample:
    """The sample with its answer in a style. Calls of tools stay as they are: they are no prose."""
    return sample if sample.tools else replace(sample, response=STYLES[name](sample.response))
