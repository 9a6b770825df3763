"""Training: the task mix, the tokenizer of the demo models, objectives, recipes and the loop.

Writes checkpoints and Hugging Face directories; serving and decoding are other rooms' work.
"""

from dfastllm.train.loop import run
from dfastllm.train.recipes import RECIPES, Init, Recipe, load_recipe

__all__ = ["RECIPES", "Init", "Recipe", "load_recipe", "run"]
