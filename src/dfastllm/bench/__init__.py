"""Benchmarks that leave a record: machine, commit, medians with spread, accuracy beside every speed.

Uses the facade and the engine like any caller; nothing imports this room but the command line."""

from dfastllm.bench.measure import Spread, machine, spread, write_record

__all__ = ["Spread", "machine", "spread", "write_record"]
