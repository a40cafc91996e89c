from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentgym.errors import BOUNDARIES, DeadlineExceeded, EnvironmentFailed, SandboxFailed, UsageError
from agentgym.outcome import TRUNCATION_REASONS, Outcome

outcomes = st.one_of(
    st.just(Outcome.completed()),
    st.builds(Outcome.truncated, st.sampled_from(TRUNCATION_REASONS), st.text()),
    st.builds(Outcome.infra_failed, st.sampled_from(BOUNDARIES), st.text(), doubtful=st.booleans()),
    st.builds(Outcome.cancelled, st.text()),
)


@given(outcomes)
def test_an_outcome_survives_json(outcome: Outcome) -> None:
    assert Outcome.from_json(json.loads(json.dumps(outcome.to_json()))) == outcome


@given(outcomes)
def test_only_completed_and_truncated_episodes_may_be_scored(outcome: Outcome) -> None:
    assert outcome.valid == (outcome.kind in ("completed", "truncated"))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("completed", "turns"),
        ("truncated", None),
        ("truncated", "environment failed"),
        ("infra_failed", None),
        ("infra_failed", "turns"),
        ("cancelled", "policy"),
        ("done", None),
    ],
)
def test_there_are_no_other_outcomes(kind: str, reason: str | None) -> None:
    with pytest.raises(UsageError, match="no outcome"):
        Outcome(kind, reason)  # type: ignore[arg-type]


def test_text_form() -> None:
    assert str(Outcome.completed()) == "completed"
    assert str(Outcome.truncated("context")) == "truncated(context)"
    assert str(Outcome.infra_failed("sandbox")) == "infra_failed(sandbox)"


def test_an_error_that_names_its_boundary_wins() -> None:
    assert Outcome.from_error(SandboxFailed("gone"), "environment").reason == "sandbox"
    assert Outcome.from_error(ValueError("odd"), "environment").reason == "environment"
    assert Outcome.from_error(DeadlineExceeded("generate", 2, boundary="policy"), "tool").reason == "policy"


def test_the_detail_of_an_error_is_one_line() -> None:
    outcome = Outcome.from_error(EnvironmentFailed("died\nTraceback", hint="look"), "environment")
    assert outcome.detail == "EnvironmentFailed: died"
    assert Outcome.from_error(ValueError(), "judge").detail == "ValueError: "
    assert len(Outcome.from_error(ValueError("x" * 10_000), "judge").detail) == 500
