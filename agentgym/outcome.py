"""How a trajectory ended. Invariant: an infrastructure failure has no reward, by construction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from agentgym.errors import BOUNDARIES, Boundary, InfrastructureError, UsageError

Kind = Literal["completed", "truncated", "infra_failed", "cancelled"]
TruncationReason = Literal["turns", "tokens", "time", "context", "repeat", "cost", "environment"]
TRUNCATION_REASONS: tuple[TruncationReason, ...] = get_args(TruncationReason)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of one trajectory.

    Attributes:
        kind: ``completed``, ``truncated``, ``infra_failed`` or ``cancelled``.
        reason: For ``truncated`` one of :data:`TRUNCATION_REASONS`; for ``infra_failed`` the boundary
            (:data:`agentgym.errors.BOUNDARIES`); otherwise ``None``.
        detail: One line for a person: the error's message, never used by a scorer.
        doubtful: The evidence for ``infra_failed`` is within reach of the policy's own actions; such
            failures are counted apart.
    """

    kind: Kind
    reason: str | None = None
    detail: str = ""
    doubtful: bool = False

    def __post_init__(self) -> None:
        allowed: tuple[str | None, ...] = (None,)
        if self.kind == "truncated":
            allowed = TRUNCATION_REASONS
        elif self.kind == "infra_failed":
            allowed = BOUNDARIES
        if self.kind not in get_args(Kind) or self.reason not in allowed:
            raise UsageError(f"no outcome {self.kind}({self.reason}); expected reason in {allowed}")

    @property
    def valid(self) -> bool:
        """Whether the trajectory may be scored, averaged and trained on."""
        return self.kind in ("completed", "truncated")

    def __str__(self) -> str:
        return self.kind if self.reason is None else f"{self.kind}({self.reason})"

    def to_json(self) -> dict[str, Any]:
        """The wire form, fields at their defaults left out."""
        full = {"kind": self.kind, "reason": self.reason, "detail": self.detail, "doubtful": self.doubtful}
        return {k: v for k, v in full.items() if v or k == "kind"}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Outcome:
        """Inverse of :meth:`to_json`."""
        return cls(**data)

    @classmethod
    def completed(cls) -> Outcome:
        """The environment reached a terminal state."""
        return cls("completed")

    @classmethod
    def truncated(cls, reason: TruncationReason, detail: str = "") -> Outcome:
        """A limit ended the episode; what was reached counts."""
        return cls("truncated", reason, detail)

    @classmethod
    def infra_failed(cls, boundary: Boundary, detail: str = "", *, doubtful: bool = False) -> Outcome:
        """Something outside the policy's reach failed."""
        return cls("infra_failed", boundary, detail, doubtful)

    @classmethod
    def cancelled(cls, detail: str = "") -> Outcome:
        """The caller stopped the episode."""
        return cls("cancelled", None, detail)

    @classmethod
    def from_error(cls, error: BaseException, boundary: Boundary) -> Outcome:
        """The outcome of an exception met at ``boundary`` (an error that names its own wins)."""
        if isinstance(error, InfrastructureError):
            boundary = error.boundary
        return cls.infra_failed(boundary, f"{type(error).__name__}: {error}".splitlines()[0][:500])
