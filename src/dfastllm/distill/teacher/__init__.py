"""Teachers: an OpenAI-compatible server or a model in this process, and their answers as a distillation set.

`collect` asks every prompt of a file once, `estimate` says before what that costs; `client` is the server's side of it,
`local` the process's own. Losses and training are elsewhere. Names are had from their modules.
"""

from __future__ import annotations

__all__: list[str] = []
