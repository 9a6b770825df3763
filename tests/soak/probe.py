"""Asks /health ten times a second and prints how long each answer took, from a process of its own: how busy the clients
are does not show in it. usage: python -m tests.soak.probe HOST PORT, until its standard input ends."""

from __future__ import annotations

import http.client
import sys
import threading
import time

EVERY = 0.1  # s
LIMIT = 10.0  # s


def main(host: str, port: int) -> None:
    over = threading.Event()

    def wait() -> None:
        sys.stdin.read()
        over.set()

    threading.Thread(target=wait, daemon=True).start()
    connection = http.client.HTTPConnection(host, port, timeout=LIMIT)
    while not over.is_set():
        began = time.monotonic()
        try:
            connection.request("GET", "/health")
            answer = connection.getresponse()
            answer.read()
            status = answer.status
        except (OSError, http.client.HTTPException):
            connection.close()
            status = 0
        took = time.monotonic() - began
        print(f"{took:.6f} {status}", flush=True)
        over.wait(max(0.0, EVERY - took))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
