"""What is measured of a model that serves, and what follows from it.

- `prometheus`: counters, fed by the engines' step stats and by the server.
- `speed`, `timelines`, `tool_schemas`: when each part of an answer came, and when its tool call was complete.
- `workload`, `model_speed`: held-out samples, and the speed of a model in this process on them.
- `evaluation`: answers to graded samples: accuracy, tool calls, lengths, forwards. `speculation`: what drafting did.
- `gates`, `hardware`, `records`, `stats`: reports, what makes two of them comparable, and the verdict.

The engine never imports this room. A metric exists only where something measures it.
"""

from dfastllm.metrics.prometheus import Metrics, Subscribable

__all__ = ["Metrics", "Subscribable"]
