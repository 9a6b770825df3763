"""What a server has: its models and their kinds, each asked the same; and what it does not have."""

import os

from dfastllm_client import Client, NotFoundError

URL = os.environ.get("DFASTLLM_URL", "http://127.0.0.1:8000")
KEY = os.environ.get("DFASTLLM_API_KEY")

with Client(URL, KEY) as client:
    answers = {}
    for model in client.models():
        if model.get("parent"):
            print(f"{model['id']}: a LoRA adapter of {model['parent']}")
            continue
        print(f"{model['id']}: {model['kind']}, {model['family']}, {model['max_model_len']} tokens")
        if model["id"] in ("demo-ar", "demo-diffusion"):
            question = [{"role": "user", "content": "What is 12 + 30?"}]
            answers[model["kind"]] = client.chat(question, model=model["id"], max_tokens=32).text
    print(answers)
    try:
        client.request("GET", "/v1/models/demo-nothing")
        raise SystemExit("a model that is not there was found")
    except NotFoundError as error:
        print(error)

assert "42" in answers["ar"]
assert "42" in answers["diffusion"]
