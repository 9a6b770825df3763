"""Judging a checkpoint: questions with a known answer from a user's file or from the task mix, asked under several
settings in turn, answers graded, and a table of accuracy beside speed. Can be stopped at any time and goes on.
"""

from __future__ import annotations

from dfastllm.eval.questions import KINDS, Question, mix_questions, read_questions
from dfastllm.eval.report import results_of, table_of
from dfastllm.eval.run import Plan, evaluate
from dfastllm.eval.settings import Setting, grid

__all__ = [
    "KINDS",
    "Plan",
    "Question",
    "Setting",
    "evaluate",
    "grid",
    "mix_questions",
    "read_questions",
    "results_of",
    "table_of",
]
