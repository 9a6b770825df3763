"""Checkpoints into other checkpoints: `dfastllm quantize`. Runs models to calibrate and to measure what was lost; the
rounding itself and the files' format are `quant`'s, serving the result is the engine's.
"""

from dfastllm.convert.quantise import CALIBRATIONS, Options, measure, quantise_model
from dfastllm.convert.report import Quality, Report, WeightReport

__all__ = ["CALIBRATIONS", "Options", "Quality", "Report", "WeightReport", "measure", "quantise_model"]
