"""The HTTP server: the OpenAI API, health, metrics and documentation over the engines of this process.

Routes and middleware are lists (`app`), bodies are declared once (`schemas`, `replies`), and a field that is not
honoured is refused. Runs no model: `engine.Worker` steps the engines on its own thread, so the event loop stays free.
Knows no tenants and holds no decoder rules.
"""

from dfastllm.server.app import create_app
from dfastllm.server.run import serve

__all__ = ["create_app", "serve"]
