"""Workers that run a peer inside the peer's own environment, one process each.

They are started by `dfastllm.bench.cpu.wire` with the peer's interpreter and know nothing of dfastllm: only the
standard library, numpy and the peer itself are imported here."""

__all__: list[str] = []
