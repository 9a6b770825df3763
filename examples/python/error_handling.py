"""What can go wrong, and what each error says: wrong input, a time limit, one's own cancel, no server."""

import os

from dfastllm_client import (
    Backoff,
    CancelledError,
    Client,
    ConnectionFailedError,
    InvalidRequestError,
    NotFoundError,
    RateLimitError,
    TimeoutError,
)

URL = os.environ.get("DFASTLLM_URL", "http://127.0.0.1:8000")
KEY = os.environ.get("DFASTLLM_API_KEY")
seen = []

with Client(URL, KEY, model="demo-ar") as client:
    try:
        client.generate("Hello", model="demo-nothing")
    except NotFoundError as error:
        print("no such model:", error)
        seen.append(error.code)

    try:
        client.generate("Hello", max_tokns=5)
    except InvalidRequestError as error:
        print("misspelt:", error)
        seen.append(error.param)

    try:
        client.generate("Count: 1 2 3", max_tokens=400, ignore_eos=True, timeout=0.01)
    except TimeoutError as error:
        print("too slow:", error)
        seen.append(error.code)

    stream = client.generate_stream("Count: 1 2 3", max_tokens=400, ignore_eos=True)
    try:
        for piece in stream:
            if piece.index >= 4:
                client.cancel(stream.request_id)
    except CancelledError as error:
        print(f"cancelled after {error.received.tokens} tokens: {error.received.text!r}")
        seen.append(error.code)

    # Refusals that say when to come back are waited for by themselves (see Backoff); without that they are raised.
    try:
        with Client(URL, KEY, model="demo-ar", backoff=Backoff(attempts=0)) as impatient:
            impatient.generate("Hello", max_tokens=1)
        print("not limited")
    except RateLimitError as error:
        print("come back in", error.retry_after, "s")

try:
    with Client("http://127.0.0.1:1", backoff=Backoff(attempts=1, first=0.01)) as nobody:
        nobody.generate("Hello")
except ConnectionFailedError as error:
    print("not sent:", error)
    seen.append(error.code)

assert seen == ["model_not_found", "max_tokns", "timeout", "cancelled", "connection_failed"], seen
