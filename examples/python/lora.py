"""A LoRA adapter, loaded while the server runs: chosen by a call, beside calls without it, and unloaded again.

The server runs with --enable-lora --lora-root DIR; DFASTLLM_LORA is a PEFT directory of demo-ar below it.
"""

import os

from dfastllm_client import Client, NotFoundError

URL = os.environ.get("DFASTLLM_URL", "http://127.0.0.1:8000")
KEY = os.environ.get("DFASTLLM_API_KEY")
LORA = os.environ.get("DFASTLLM_LORA")
if not LORA:
    raise SystemExit("DFASTLLM_LORA must name a PEFT directory of demo-ar below the server's --lora-root (README.md).")
PROMPT = {"prompt": "What is 12 + 30?", "max_tokens": 24, "temperature": 0}

with Client(URL, KEY, model="demo-ar") as client:
    card = client.load_adapter("example", LORA, model="demo-ar", replace=True)
    print("loaded", card["id"], "of", card["parent"])
    base = client.generate(PROMPT)
    adapted = client.generate(PROMPT, lora="example")
    by_name = client.generate(PROMPT, model="demo-ar:example")
    print("without:", repr(base.text))
    print("with:   ", repr(adapted.text))
    assert adapted.text == by_name.text != base.text
    assert client.generate(PROMPT).text == base.text, "the base model is as it was"

    client.unload_adapter("example", model="demo-ar")
    try:
        client.generate(PROMPT, lora="example")
        raise SystemExit("an adapter that is gone was taken")
    except NotFoundError as error:
        print("unloaded:", error)
