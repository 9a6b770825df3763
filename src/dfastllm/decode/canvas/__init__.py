"""Diffusion on a canvas: where its blocks lie, which positions are unmasked when, with which K,V cache."""

from dfastllm.decode.canvas.block import BlockDiffusion
from dfastllm.decode.canvas.diffusion import MaskedDiffusion

__all__ = ["BlockDiffusion", "MaskedDiffusion"]
