"""The WebSocket front, GET /ws: many calls at once on one connection, over the same requests as HTTP's.

`protocol` the frames, each a declared type; `session` one connection; `functions` the table of what may be called, from
which `metadata` tells. What a call may hold, how long it may take and what it may be refused for is the HTTP API's: a
call of `generate` becomes the body of a completion or of a chat.
"""

__all__: list[str] = []
