"""Two tenants of one server: each with a key and limits of its own, and only its own usage to see.

The server runs with --tenants-db; DFASTLLM_ADMIN_KEY has the scope admin (docs/tenants.md).
"""

import os
import time
import uuid

from dfastllm_client import Backoff, Client, NotFoundError, RateLimitError

URL = os.environ.get("DFASTLLM_URL", "http://127.0.0.1:8000")


def tenant_with_key(admin: Client, name: str, **limits: object) -> str:
    admin.request("POST", "/admin/v1/tenants", {"name": name, **limits})
    made = admin.request("POST", "/admin/v1/keys", {"tenant": name, "scopes": ["generate", "usage"]})
    return made["key"]  # shown this once


with Client(URL, os.environ["DFASTLLM_ADMIN_KEY"]) as admin:
    run = uuid.uuid4().hex[:8]
    keys = {
        "large": tenant_with_key(admin, f"large-{run}", weight=2),
        "small": tenant_with_key(admin, f"small-{run}", models=["demo-ar"], requests_per_minute=2),
    }

answered = {}
for name, key in keys.items():
    with Client(URL, key, model="demo-ar", backoff=Backoff(attempts=0)) as client:
        answered[name] = [client.generate("What is 12 + 30?", max_tokens=8) for _ in range(2)]
        print(name, "got", answered[name][0].text.strip().splitlines()[0])

with Client(URL, keys["small"], model="demo-ar", backoff=Backoff(attempts=0)) as small:
    try:
        small.generate("A third question in a minute", max_tokens=8)
        raise SystemExit("the limit did not hold")
    except RateLimitError as error:
        print(f"small is over its limit; it may come back in {error.retry_after} s")
    try:
        small.generate("Hello", model="demo-diffusion")
        raise SystemExit("the list of models did not hold")
    except NotFoundError as error:
        print("small:", error)
    for _ in range(50):  # the last line of the ledger is written as the answer ends
        [used] = small.usage(by=["model"])["data"]
        if used["ok"] == 2:
            break
        time.sleep(0.1)

print("small used", used["completion_tokens"], "tokens of", used["model"])
assert used["completion_tokens"] == sum(result.tokens_generated for result in answered["small"])
