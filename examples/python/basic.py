"""A question, its answer, and what it took; over HTTP, and the same over a WebSocket.

DFASTLLM_URL and DFASTLLM_API_KEY say where and as whom (see examples/README.md).
"""

import asyncio
import os

from dfastllm_client import AsyncWebSocketClient, Client

URL = os.environ.get("DFASTLLM_URL", "http://127.0.0.1:8000")
KEY = os.environ.get("DFASTLLM_API_KEY")
QUESTION = [{"role": "user", "content": "What is 12 + 30?"}]


async def over_a_websocket() -> str:
    async with AsyncWebSocketClient(URL, KEY, model="demo-diffusion") as client:
        print("connected as", client.get_tenant_id())
        return (await client.chat(QUESTION, max_tokens=32)).text


with Client(URL, KEY, model="demo-diffusion") as client:
    print("server:", client.health().status)
    result = client.chat(QUESTION, max_tokens=32)
    print("answer:", result.text)
    print(f"{result.prompt_tokens} tokens asked, {result.tokens_generated} answered in {result.time_ms:.0f} ms")

assert "42" in result.text
assert asyncio.run(over_a_websocket()) == result.text
