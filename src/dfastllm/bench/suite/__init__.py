"""`dfastllm bench`: measure any OpenAI-compatible server the way its users feel it.

Speaks HTTP and nothing else with what it measures, ours included. `schema` is the file it leaves; `client` times one
request; `probe` finds servers and what they can do; `workloads` are the prompts and their graders; `sweep` compares
configurations, `load` drives concurrency and arrival rates; `suite` is the order of it all."""

from dfastllm.bench.suite.schema import Results, load_results, save_results

__all__ = ["Results", "load_results", "save_results"]
