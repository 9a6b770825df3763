"""The server's Prometheus metrics: what one call adds to them."""

import os
import re

from dfastllm_client import Client

URL = os.environ.get("DFASTLLM_URL", "http://127.0.0.1:8000")
KEY = os.environ.get("DFASTLLM_API_KEY")


def total(text: str, name: str) -> float:
    """The sum of a counter of demo-ar over its other labels."""
    lines = re.findall(rf'^dfastllm_{name}{{[^}}]*model_name="demo-ar"[^}}]*}} (\S+)$', text, re.MULTILINE)
    return sum(map(float, lines))


with Client(URL, KEY, model="demo-ar") as client:
    before = client.metrics()
    result = client.generate("What is 12 + 30?", max_tokens=16)
    after = client.metrics()

for name, wanted in (
    ("generation_tokens_total", result.tokens_generated),
    ("prompt_tokens_total", result.prompt_tokens),
    ("request_success_total", 1),
):
    grown = total(after, name) - total(before, name)
    print(f"{name}: +{grown:g}")
    assert grown == wanted, (name, grown, wanted)
