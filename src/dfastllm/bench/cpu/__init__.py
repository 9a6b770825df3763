"""CPU records against llama.cpp, OpenVINO and PyTorch: one command each, `python -m dfastllm.bench cpu NAME`.

Peers live in environments of their own and run as worker processes; this process never imports them. Both sides are
measured in turns (ours, peer, ours, peer, ...) at the same number of threads, and the ratio is taken turn by turn.
"""

from dfastllm.metrics.stats import Ratio, Summary, paired_ratio, summarise

__all__ = ["Ratio", "Summary", "paired_ratio", "summarise"]
