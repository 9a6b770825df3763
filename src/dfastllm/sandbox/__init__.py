"""Code of others, run where it can do little: WebAssembly modules that tenants bring (`wasm`), which turn one text into
another with fuel, memory, time and size limits and no imports; and Python programs that models write (`program`), in a
process of their own. Knows no server, no tenant and no model.
"""

from __future__ import annotations

from dfastllm.sandbox.program import Guarantees, ProgramLimits, Ran, guarantees, run_program
from dfastllm.sandbox.wasm import Limits, Module

__all__ = ["Guarantees", "Limits", "Module", "ProgramLimits", "Ran", "guarantees", "run_program"]
