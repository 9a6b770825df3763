"""Students: smaller or quicker models made from others, and how they learn from them.

`layers` makes a smaller model of one's layers; `draft` aligns a draft model to its target on the user's own prompts;
`diffusion` makes a canvas model need fewer forwards.
"""

from __future__ import annotations

__all__: list[str] = []
