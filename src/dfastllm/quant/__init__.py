"""Quantisation: formats, the scale search, GPTQ, calibration statistics, and quantised weights in files.

Works on matrices and files: it knows no model and no tokenizer (`convert` runs models to calibrate), and computes with
nothing it makes (that is `kernels`).
"""

from dfastllm.quant.calibrate import InputStatistics, recording
from dfastllm.quant.checkpoint import QuantConfig, Stored, stored
from dfastllm.quant.formats import FORMATS, Format, find_format, quantise
from dfastllm.quant.gptq import gptq
from dfastllm.quant.stream import Planned, SafetensorsWriter

__all__ = [
    "FORMATS",
    "Format",
    "InputStatistics",
    "Planned",
    "QuantConfig",
    "SafetensorsWriter",
    "Stored",
    "find_format",
    "gptq",
    "quantise",
    "recording",
    "stored",
]
