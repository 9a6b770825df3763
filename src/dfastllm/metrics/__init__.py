"""Prometheus metrics: subscribes to the engines' step stats and hears from the server about HTTP requests.

The engine never imports this room. Nothing here decides anything or keeps a log; a metric exists only where something
measures it.
"""

from dfastllm.metrics.prometheus import Metrics, Subscribable

__all__ = ["Metrics", "Subscribable"]
