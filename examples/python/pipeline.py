"""A pipeline of two models, registered on the running server and run by name: told as it goes, and over a WebSocket."""

import os

from dfastllm_client import Client, WebSocketClient

URL = os.environ.get("DFASTLLM_URL", "http://127.0.0.1:8000")
KEY = os.environ.get("DFASTLLM_API_KEY")
PIPELINE = {
    "name": "second-opinion",
    "steps": [
        {"id": "first", "model": "demo-ar", "input": "{{ input }}", "options": {"max_tokens": 16, "temperature": 0}},
        {
            "id": "second",
            "model": "demo-diffusion",
            "messages": [{"role": "user", "content": "{{ input }}"}],
            "options": {"max_tokens": 16},
            "when": "first | length > 0",
        },
    ],
    "output": "{{ second or first }}",
}

with Client(URL, KEY) as client:
    client.register_pipeline(PIPELINE)
    stream = client.stream_pipeline("second-opinion", "What is 12 + 30?")
    for event in stream:
        print(event.step, event.type, repr(event.text) if event.text else "")
    result = stream.result
    print("output:", result.output, f"({result.tokens_generated} tokens)")

with WebSocketClient(URL, KEY) as client:
    assert client.execute_pipeline("second-opinion", "What is 12 + 30?").output == result.output

assert [step["status"] for step in result.steps] == ["done", "done"]
assert "42" in result.output
