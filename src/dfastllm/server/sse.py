"""Server-sent events: the streaming answers of the OpenAI API.

`data:` lines, `data: [DONE]` at the end, an error in mid-stream as a `data: {"error": ...}` line before it. The stream
ends as soon as the client disconnects, which closes the events and with them the engine's requests.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dfastllm.errors import DFastLLMError, GenerationError
from dfastllm.server.jobs import disconnected
from dfastllm.server.refusals import error_body

__all__ = ["EventStream"]

log = logging.getLogger("dfastllm.server")


class EventStream(Response):
    """`chunks` yields JSON texts. `cancel` is called when the stream ends, in whatever way."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[str], cancel: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.chunks = chunks
        self.cancel = cancel

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        tasks: list[asyncio.Task[None]] = []
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            tasks = [asyncio.create_task(self._pump(send)), asyncio.create_task(disconnected(receive))]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0].done():
                tasks[0].result()
        finally:
            self.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _pump(self, send: Send) -> None:
        async with aclosing(self.chunks) as chunks:
            try:
                async for chunk in chunks:
                    await _data(send, chunk)
            except DFastLLMError as error:
                await _data(send, json.dumps(error_body(error)))
            except OSError:  # the client is gone
                return
            except Exception:
                log.exception("a stream failed")
                await _data(send, json.dumps(error_body(GenerationError("The server failed on this request."))))
        await _data(send, "[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _data(send: Send, text: str) -> None:
    await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True})
