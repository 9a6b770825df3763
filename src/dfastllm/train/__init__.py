"""Training: the task mix, the tokenizer of the demo models, objectives, recipes and the loop.

Writes checkpoints and Hugging Face directories; serving and decoding are other rooms' work.
"""

from dfastllm.train.loop import fit
from dfastllm.train.plan import Plan
from dfastllm.train.recipes import RECIPES, Init, Recipe, load_recipe
from dfastllm.train.run import run
from dfastllm.train.work import Losses, Work

__all__ = ["RECIPES", "Init", "Losses", "Plan", "Recipe", "Work", "fit", "load_recipe", "run"]
