"""The soak: a server under mixed traffic and attack for minutes, every answer held against what it is alone.

`python -m tests.soak --help`; scripts/soak is the same. tests/server/test_soak.py runs seconds of it.
"""
