"""Benchmarks that leave a record: machine, commit, medians with spread, accuracy beside every speed.

Uses the facade and the engine like any caller; nothing imports this room but the command line, for which
`command` and `gate_command` load nothing until they run.
"""

__all__: list[str] = []
