"""Where a model lies: the names that there are, the files of a directory, what is fetched and kept.

A model is named in one way everywhere (serve, chat, generate, quantize, check, bench, `LLM`): by `find_model`. It knows
files and names; what is in them is for `assemble` to read.
"""

from dfastllm.hub.find import find as find_model
from dfastllm.hub.find import title
from dfastllm.hub.names import KNOWS, SHIPPED, shipped_models

__all__ = ["KNOWS", "SHIPPED", "find_model", "shipped_models", "title"]
