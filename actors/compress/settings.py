"""How a job's gradients are compressed where they travel, as values from a config. No torch here."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args, get_type_hints

from actors.errors import InvalidInput

Method = Literal["none", "powersgd", "topk", "int8", "fp8"]
MAX_RANK = 256


@dataclass(frozen=True)
class CompressionSettings:
    """What one sender leaves out of a step it adds to its next one (error feedback), so nothing is left out for good.

    `check` says whether a method can use the values.
    """

    method: Method = "none"
    """`powersgd`: low-rank factors; `topk`: the largest values; `int8`, `fp8` (e4m3): a byte a value; `none`: as they
    are, and routers together make the update that one alone would."""
    rank: int = 4
    """Of `powersgd`."""
    share: float = 0.01
    """Of each parameter's values that `topk` sends, above 0 to 1."""
    quantised: bool = False
    """What `powersgd` and `topk` send goes as INT8."""
    copies: bool = False
    """Not only the trunk's gradients between routers, but those of expert groups between their copies too."""

    def for_copies(self) -> dict[str, Any]:
        """What expert actors are told of it with every step; nothing where their gradients go as they are."""
        return {"compression": asdict(self)} if self.copies and self.method != "none" else {}

    def check(self) -> None:
        """Raises `InvalidInput` for the first value that cannot be used."""
        self._check("method", self.method in get_args(Method), "is no method", f"use {', '.join(get_args(Method))}")
        for field in fields(self):
            hint = get_type_hints(type(self))[field.name]
            if hint in (int, bool):
                is_right = type(getattr(self, field.name)) is hint
                self._check(field.name, is_right, "has another type", f"use {hint.__name__}")
        self._check("rank", 1 <= self.rank <= MAX_RANK, "is no rank", f"use 1 to {MAX_RANK}")
        self._check("share", 0 < self.share <= 1, "is no share", "use a number above 0, at most 1")

    def _check(self, name: str, is_right: bool, message: str, remedy: str) -> None:
        if not is_right:
            raise InvalidInput(message, field=f"compression.{name}", value=getattr(self, name), remedy=remedy)
