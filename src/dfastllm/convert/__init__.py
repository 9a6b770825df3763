"""Checkpoints into other checkpoints: `dfastllm quantize`. Runs models to calibrate and to measure what was lost; the
rounding itself and the files' format are `quant`'s, serving the result is the engine's.
"""

from dfastllm.convert.gguf import GGUF_FORMATS, quantise_gguf
from dfastllm.convert.quantise import CALIBRATIONS, Options, measure, quantise_model
from dfastllm.convert.report import Quality, Report, WeightReport

__all__ = [
    "CALIBRATIONS",
    "GGUF_FORMATS",
    "Options",
    "Quality",
    "Report",
    "WeightReport",
    "measure",
    "quantise_gguf",
    "quantise_model",
]
