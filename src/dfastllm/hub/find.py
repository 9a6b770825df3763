"""`find`: the one way from what a person calls a model to what is loaded."""

from __future__ import annotations

from pathlib import Path

from dfastllm.errors import ModelNotFoundError
from dfastllm.hub.names import PACKAGED, SHIPPED, shipped_models
from dfastllm.hub.places import place_of

__all__ = ["find"]


def find(model: str | Path) -> Path:
    """Where a model lies. A shipped model's name, a path of the disk (`places.place_of`), or a name that `dfastllm
    pull` fetches from a package. A path that exists wins over every name but a shipped one's.

    Raises ModelNotFoundError naming what there is, ModelLoadError for a file that is no model.
    """
    name = str(model)
    if name in shipped_models():
        return SHIPPED / name
    path = Path(model)
    if path.exists():
        return place_of(path)
    known = [*shipped_models(), *PACKAGED]
    raise ModelNotFoundError(
        f"no model {name!r}: it is neither a directory nor a GGUF file nor one of {', '.join(known)}.", param="model"
    )
