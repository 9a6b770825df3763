"""Runners: what computes a step. Each owns the K,V of one model."""

from dfastllm.engine.runners.torch import Runnable, Runner, runner_for

__all__ = ["Runnable", "Runner", "runner_for"]
