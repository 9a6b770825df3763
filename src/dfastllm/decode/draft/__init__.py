"""Drafters that need no model: what may follow a text, from the text itself and from past outputs.

Pure functions and small indexes over token ids. Drafters that run a model are the engine's (`engine.drafting`); what of
a draft stands is decided by `decode.verify`, so a drafter can be wrong but never changes a result.
"""

from dfastllm.decode.draft.ngram import Ngram
from dfastllm.decode.draft.protocol import Drafter
from dfastllm.decode.draft.suffix import Suffix

__all__ = ["Drafter", "Ngram", "Suffix"]
