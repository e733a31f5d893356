"""Bearer tokens and what they are good for. The front keeps digests only: its file gives no token away.

A token is 256 random bits, so one round of SHA-256 is enough to hide it; it needs no salt and no slow hash.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from actors.errors import InvalidInput
from cluster.service.codec import checks
from cluster.service.reload import read_bytes

FIELD = "front.auth.tokens_file"
PREFIX = "moe_"
"""So that a token is known for one where it should not be: in logs, in repositories."""
_DIGEST = re.compile(r"[0-9a-f]{64}")


class Role(enum.IntEnum):
    """Each may do what those before it may."""

    INFER = 1
    """Inference, and the cluster's status."""
    TRAIN = 2
    """Jobs, and everything of the cluster that is only looked at."""
    ADMIN = 3
    """Everything."""

    def __str__(self) -> str:
        return self.name.lower()


ROLES = {str(role): role for role in Role}


@dataclass(frozen=True)
class Caller:
    name: str
    role: Role


class TokenTable:
    """Whose token it is. Holds digests of tokens, never a token."""

    def __init__(self, callers: Iterable[tuple[bytes, Caller]]) -> None:
        self._callers = tuple(callers)

    def __len__(self) -> int:
        return len(self._callers)

    def caller(self, token: str) -> Caller | None:
        """None for a token that is not in the table. Takes as long whichever it is, and however much of it is right."""
        digest, found = _digest(token), None
        for known, caller in self._callers:
            if hmac.compare_digest(known, digest):
                found = caller
        return found


def new_token() -> str:
    return PREFIX + secrets.token_urlsafe(32)


def line_of(token: str, role: Role, name: str) -> str:
    """What a tokens file says of a token. `InvalidInput` for a name that is no single word."""
    checks.identifier("name", name)
    return f"{role} {name} {_digest(token).hex()}"


def read_tokens(file: Path) -> TokenTable:
    """A line `ROLE NAME SHA256` for each token; a name may have several. Empty lines and those that begin with # are
    left out. `InvalidInput` names file and line, and shows nothing of it: somebody may have written a token there."""
    text = read_bytes(file, FIELD).decode(errors="replace")
    lines = ((number, line.split()) for number, line in enumerate(text.splitlines(), 1))
    callers = [_entry(words, f"{FIELD}: {file} line {number}") for number, words in lines if _says_something(words)]
    digests = [digest for digest, _ in callers]
    if len(set(digests)) < len(digests):
        raise InvalidInput(f"{file} has the same token twice", field=FIELD, remedy="leave one of the lines")
    return TokenTable(callers)


def _says_something(words: list[str]) -> bool:
    return bool(words) and not words[0].startswith("#")


def _entry(words: list[str], where: str) -> tuple[bytes, Caller]:
    remedy = "write ROLE NAME SHA256, as `moe-cluster token` prints it"
    if len(words) != 3:
        raise InvalidInput(f"has {len(words)} words, not 3", field=where, remedy=remedy)
    role, name, digest = words
    if role not in ROLES:
        raise InvalidInput("begins with no role", field=where, remedy=f"use one of {', '.join(ROLES)}")
    if not checks.is_identifier(name):
        raise InvalidInput("has a name with other than letters, digits and ._:-", field=where, remedy=remedy)
    if not _DIGEST.fullmatch(digest):
        raise InvalidInput("ends with no SHA-256 digest (64 small hex digits)", field=where, remedy=remedy)
    return bytes.fromhex(digest), Caller(name, ROLES[role])


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
