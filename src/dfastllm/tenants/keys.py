"""The text of a key, `dfk_ID_SECRET`, and its hash: argon2id (RFC 9106), so that a stolen database opens nothing.

The secret has 256 random bits; the costs are the least that OWASP's Password Storage Cheat Sheet names for argon2id
(19 MiB, 2 passes, 1 lane): some tens of milliseconds of one core for a key that is not remembered.
"""

from __future__ import annotations

import base64
import re
import secrets
from functools import cache

from dfastllm.errors import UnsupportedError

try:
    from argon2 import PasswordHasher
    from argon2.exceptions import InvalidHashError, VerificationError
except ImportError:
    raise UnsupportedError(
        "Keys of tenants need argon2-cffi, which is not installed.",
        param="tenants_db",
        hint="pip install 'dfastllm[tenants]', or ./run setup tenants in a clone.",
    ) from None

__all__ = ["hashed", "new_key", "proves", "split"]

_HASHER = PasswordHasher(time_cost=2, memory_cost=19 << 10, parallelism=1)
_TEXT = re.compile(r"dfk_([a-z0-9]{12})_([a-z2-7]{52})")


def _letters(size: int) -> str:
    return base64.b32encode(secrets.token_bytes(size)).decode().rstrip("=").lower()


def new_key() -> tuple[str, str]:
    """(id, text) of a key that nobody has."""
    key_id = _letters(8)[:12]
    return key_id, f"dfk_{key_id}_{_letters(32)}"


def split(text: str) -> tuple[str, str] | None:
    """(id, secret), or None for a text that can be no key."""
    matched = _TEXT.fullmatch(text)
    return None if matched is None else (matched[1], matched[2])


@cache
def _nobodys() -> str:
    """What a secret is compared with where there is no such key."""
    return _HASHER.hash(secrets.token_hex(32))


def hashed(secret: str) -> str:
    """The hash to keep."""
    return _HASHER.hash(secret)


def proves(secret: str, kept: str | None) -> bool:
    """Whether the secret is the one of this hash. None (there is no such key) is never proved and takes as long."""
    try:
        return _HASHER.verify(_nobodys() if kept is None else kept, secret) and kept is not None
    except (VerificationError, InvalidHashError):
        return False
