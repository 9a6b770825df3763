"""Code that tenants bring, run where it can do nothing but turn one text into another: WebAssembly modules (`wasm`)
with fuel, memory, time and size limits, and no imports. Knows no server, no tenant and no model.
"""

from __future__ import annotations

from dfastllm.sandbox.wasm import Limits, Module

__all__ = ["Limits", "Module"]
