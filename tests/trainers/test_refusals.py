"""What a config accepts acts, or stands at its default; and a run's saved settings are accepted again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agentgym import config as configuration
from agentgym.errors import ConfigError
from agentgym.trainers import launch
from agentgym.trainers.correction import CorrectionConfig
from agentgym.trainers.covariance import CovarianceConfig
from agentgym.trainers.policy_loss import PolicyLossConfig

Make = Callable[..., Any]
GIVEN = ["env=agentgym.testing:EchoEnv", "model=none"]
CLIP_COV = "loss.covariance.kind=clip"

IDLE = {
    # preset, settings: what the message names, what the hint names
    ("cispo", "loss.clip_dual=3"): ("loss.clip_dual is 3.0, but objective 'cispo'", "objective='clip'"),
    ("drbot", "loss.objective=cispo"): ("loss.clip_dual is 10.0", "clip_dual=0"),
    ("grpo", "loss.length_norm=64"): ("loss.length_norm is 64.0, but aggregation", "sum-norm"),
    ("dr_grpo", "loss.aggregation=token-mean"): ("loss.length_norm is 256.0", "length_norm=0"),
    ("dapo", "loss.kl=k2"): ("loss.kl is 'k2', but there is no reference", "loss.kl_coef"),
    ("grpo", "filter_rounds=2"): ("filter_rounds is 2, but", "filter_groups=true"),
    ("grpo", "correction.level=sequence"): ("correction.level is 'sequence', but rule is 'none'", "rule="),
    ("grpo", "correction.high=3"): ("correction.high is 3.0", "rule="),
    ("grpo", "correction.low=0.1", "correction.rule=truncate"): ("correction.low is 0.1", "rule='mask'"),
    ("grpo", "correction.low=0.1", "correction.reject=k1"): ("correction.low is 0.1", "rule="),
    ("grpo", "correction.reject_above=3"): ("correction.reject_above is 3.0", "reject="),
    ("grpo", "correction.reject_level=sequence"): ("correction.reject_level is 'sequence'", "reject="),
    ("grpo", CLIP_COV, "loss.covariance.coef=2"): ("covariance.coef is 2.0, but kind is 'clip'", "kind='kl'"),
    ("spear", "loss.covariance.kind=kl"): ("covariance.low is 1.0, but kind is 'kl'", "2.0"),
    ("grpo", "loss.covariance={kind='kl', high=9}"): ("covariance.high is 9.0", "60.0"),
    ("drbot", "filters.incomplete=false", "filters.truncations=['turns']"): ("filters.truncations", "=true"),
    ("drbot", "filters.repetitive=false", "filters.ngram=5"): ("filters.ngram is 5", "repetitive=true"),
    ("drbot", "filters.repetitive=false", "filters.repeats=5"): ("filters.repeats is 5", "repetitive=true"),
    ("epo", "epo.phase=release", "epo.k_mid=5"): ("epo.k_mid is 5.0, but phase is 'release'", "'beta'"),
    ("epo", "epo.phase=constant", "epo.gamma=2"): ("epo.gamma is 2.0", "phase='beta'"),
    ("ppo", "ppo.value_coef=0.5"): ("ppo.value_coef is 0.5, but", "critic='shared'"),
    ("ppo", "ppo.critic=shared", "ppo.optimiser.lr=1e-4"): ("ppo.optimiser.lr is 0.0001", "optimiser.lr"),
    ("ppo", "ppo.critic=shared", "ppo.optimiser.schedule=linear"): ("ppo.optimiser.schedule", "separate"),
    ("loop", "loss.ratio=trajectory", "rollout.layout=turn"): ("a row a turn", "ratio='turn'"),
    ("grpo", "env.history_observations=false"): ("history_observations is False", "env.history"),
    ("cloning", "stop_at_success=0.5"): ("stop_at_success is 0.5, but", "evaluation.every"),
}  # fmt: skip


@pytest.mark.parametrize(("given", "said"), IDLE.items(), ids=lambda x: " ".join(x) if len(x) > 1 else None)
def test_a_setting_that_would_change_nothing_is_refused(
    given: tuple[str, ...], said: tuple[str, str]
) -> None:
    name, *overrides = given
    with pytest.raises(ConfigError) as caught:
        launch.resolve(name, overrides=[*GIVEN, *overrides])
    assert said[0] in caught.value.message and said[1] in caught.value.hint


ACTS = [
    ("drbot", "loss.objective=cispo", "loss.clip_dual=0"),
    ("dr_grpo", "loss.aggregation=token-mean", "loss.length_norm=0"),
    ("reinforce_plus_plus", "loss.kl=k2"),
    ("grpo", "loss.kl=k2"),
    ("dapo", "filter_rounds=2"),
    ("grpo", "correction.rule=truncate", "correction.high=3", "correction.level=sequence"),
    ("grpo", "correction.rule=mask", "correction.low=0.1"),
    ("grpo", "correction.reject=k1", "correction.reject_above=3", "correction.reject_level=sequence"),
    ("grpo", "loss.covariance={kind='kl', coef=2}"),
    ("spear", "loss.covariance.kind=kl", "loss.covariance.low=2", "loss.covariance.high=60"),
    ("drbot", "filters.ngram=5", "filters.truncations=['turns']"),
    ("epo", "epo.k_mid=5", "epo.gamma=2"),
    ("ppo", "ppo.critic=shared", "ppo.value_coef=0.5"),
    ("ppo", "ppo.optimiser.lr=1e-4"),
    ("loop", "loss.ratio=turn", "rollout.layout=turn"),
    ("loop", "loss.ratio=trajectory"),
    ("grpo", "env.history=2", "env.history_observations=false"),
    ("cloning", "stop_at_success=0.5", "evaluation.every=2"),
]


@pytest.mark.parametrize(
    "given", [*((name,) for name in sorted({*launch.presets()} - {"pocket"})), *ACTS], ids=" ".join
)
def test_a_run_s_saved_settings_are_accepted_again(given: tuple[str, ...], tmp_path: Path) -> None:
    """There all settings are written down, those at their defaults too."""
    name, *overrides = given
    _, config = launch.resolve(name, overrides=[*GIVEN, *overrides])
    configuration.save(config, tmp_path / "config.toml")
    _, again = launch.reopen(tmp_path)
    assert again == config
    explicit = type(config).model_validate(config.model_dump())
    assert explicit == config


def test_zero_stands_for_no_dual_clip() -> None:
    """So that a preset's can be taken back."""
    assert PolicyLossConfig(clip_dual=0.0).clip_dual is None
    with pytest.raises(ConfigError, match="clip_dual must be above 1"):
        PolicyLossConfig(clip_dual=-3.0)


# Clip-cov ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", ["sequence", "turn", "trajectory"])
def test_s10_clip_cov_is_refused_where_the_loss_clips_no_token_ratios(ratio: Any) -> None:
    """It leaves out tokens that are clipped already, and it looks for them token by token."""
    with pytest.raises(ConfigError, match=f"clip-cov .*token ratios.*{ratio}") as caught:
        PolicyLossConfig(ratio=ratio, covariance=CovarianceConfig())
    assert "kind='kl'" in caught.value.hint and "spear.covariance_fraction=0" in caught.value.hint
    PolicyLossConfig(ratio=ratio, covariance=CovarianceConfig("kl"))
    with pytest.raises(ConfigError, match="token ratios"):
        launch.resolve("loop", overrides=[*GIVEN, f"loss.ratio={ratio}"], added=["spear"])
    launch.resolve(
        "loop", overrides=[*GIVEN, f"loss.ratio={ratio}", "spear.covariance_fraction=0"], added=["spear"]
    )


def test_a_default_correction_needs_no_rule() -> None:
    assert CorrectionConfig() == CorrectionConfig("none", "token", 0.5, 2.0, "none", "token", 2.0)
