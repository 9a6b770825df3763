"""An answer as it grows: token by token from an autoregressive model, as a canvas from a diffusion model."""

import os

from dfastllm_client import Client

URL = os.environ.get("DFASTLLM_URL", "http://127.0.0.1:8000")
KEY = os.environ.get("DFASTLLM_API_KEY")
QUESTION = [{"role": "user", "content": "What is 12 + 30?"}]

with Client(URL, KEY) as client:
    stream = client.chat_stream(QUESTION, model="demo-ar", max_tokens=32)
    for text in stream.text():
        print(text, end="|", flush=True)
    print(f"\n{stream.result.tokens_generated} tokens")
    assert "42" in stream.result.text

    steps = []
    stream = client.chat_stream(QUESTION, model="demo-diffusion", max_tokens=32, canvas_events=True)
    for piece in stream:
        for event in piece.canvas:
            if event["type"] == "commit":
                print("committed:", {token["position"]: token["text"] for token in event["tokens"]})
            elif event["type"] == "stats":
                steps.append(event["masked"])
    print("still masked after each step:", steps)
    print("answer:", stream.result.text)
    assert "42" in stream.result.text
    assert steps == sorted(steps, reverse=True)
