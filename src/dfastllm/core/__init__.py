"""The nouns everything else is made of: frozen values (and the one mutable sequence state). Imports no room but errors
and options, and no torch: importing it is cheap."""

from dfastllm.core.ends import Ends
from dfastllm.core.event import CanvasUpdate, Finish, StepEvent, StepStats, Usage
from dfastllm.core.model import Confidence, Kind, ModelInfo
from dfastllm.core.request import Cache, DecodeParams, Request, SamplingParams
from dfastllm.core.sequence import SequenceState
from dfastllm.core.span import Attend, Branch, Commit, FinishReason, Span, Store, TokenLogprob
from dfastllm.core.speculative import (
    Acceptance,
    Draft,
    SpeculativeConfig,
    SpeculativeMethod,
    SpeculativeParams,
    speculative_params,
)
from dfastllm.core.tier import Tier
from dfastllm.core.value import value

__all__ = [
    "Acceptance",
    "Attend",
    "Branch",
    "Cache",
    "CanvasUpdate",
    "Commit",
    "Confidence",
    "DecodeParams",
    "Draft",
    "Ends",
    "Finish",
    "FinishReason",
    "Kind",
    "ModelInfo",
    "Request",
    "SamplingParams",
    "SequenceState",
    "Span",
    "SpeculativeConfig",
    "SpeculativeMethod",
    "SpeculativeParams",
    "StepEvent",
    "StepStats",
    "Store",
    "Tier",
    "TokenLogprob",
    "Usage",
    "speculative_params",
    "value",
]
