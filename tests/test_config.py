"""Configuration: precedence, shorthands, errors that teach, secrets that are never saved."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

pytest.importorskip("torch")

from agentgym import config as configuration
from agentgym.errors import ConfigError, UnknownName, UsageError
from agentgym.trainers import launch
from agentgym.trainers.policy_gradient import PolicyGradientConfig

BASE = ["env=agentgym.testing:EchoEnv", "model=tiny"]


def resolve(*overrides: str, name: str = "grpo", sources: tuple[Path, ...] = ()) -> PolicyGradientConfig:
    _, config = launch.resolve(name, sources, [*BASE, *overrides])
    assert isinstance(config, PolicyGradientConfig)
    return config


@pytest.mark.parametrize(
    ("override", "near"),
    [
        ("group_sise=4", "group_size"),
        ("optimiser.learning_rat=1", "optimiser."),
        ("loss.clip_hihg=1", "loss.clip_high"),
        ("env.parsr=tags", "env.parser"),
        ("lr=1e-5", "optimiser.lr"),
        ("max_tokens=8", "rollout.max_tokens"),
    ],
)
def test_an_unknown_key_names_the_nearest(override: str, near: str) -> None:
    with pytest.raises(ConfigError, match="unknown key") as caught:
        resolve(override)
    assert near in caught.value.hint


@pytest.mark.parametrize(
    ("override", "key"),
    [("groups=many", "groups"), ("groups=0", "groups"), ("optimiser.lr=-1", "optimiser.lr"),
     ("optimiser.lr=inf", "optimiser.lr"), ("trackers=wandb", "trackers"),
     ("rollout.layout=tree", "rollout.layout"), ("loss.clip_low=x", "loss.clip_low")],
)  # fmt: skip
def test_a_wrong_value_names_its_key(override: str, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        resolve(override)


@pytest.mark.parametrize("text", ["groups", "=3", "a..b=1"])
def test_an_override_needs_key_and_value(text: str) -> None:
    with pytest.raises(ConfigError, match="cannot read the override"):
        resolve(text)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        launch.resolve("grpo", overrides=["model=tiny"])
    assert "env" in caught.value.hint


def test_overrides_over_files_over_the_preset_over_defaults(tmp_path: Path) -> None:
    first, second = tmp_path / "a.toml", tmp_path / "b.toml"
    first.write_text("groups = 3\nsteps = 7\n[loss]\nclip_low = 0.1\n")
    second.write_text("steps = 9\n")
    config = resolve("groups=5", name="dapo", sources=(first, second))
    assert (config.groups, config.steps, config.loss.clip_low) == (5, 9, 0.1)
    assert config.loss.clip_high == 0.28 and config.filter_groups and config.group_size == 8


def test_shorthand_and_table_merge() -> None:
    config = resolve("env.kwargs.words=4", "env=agentgym.testing:NoopEnv", "env.kwargs.turns=2")
    assert config.env.id == "agentgym.testing:NoopEnv"
    assert config.env.kwargs == {"words": 4, "turns": 2}


def test_broken_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text("a = = 1")
    with pytest.raises(ConfigError, match=r"x\.toml is no TOML"):
        resolve(sources=(tmp_path / "x.toml",))
    with pytest.raises(ConfigError, match=r"cannot read the config .*none\.toml"):
        resolve(sources=(tmp_path / "none.toml",))


@pytest.mark.parametrize("name", sorted({*launch.presets()} - {"pocket"}))
def test_a_preset_loads_and_names_its_paper(name: str) -> None:
    path = launch.presets()[name]
    assert "20" in path.read_text().splitlines()[0] and "et al." in path.read_text().splitlines()[0]
    _, config = launch.resolve(name, overrides=BASE)
    assert config.algorithm == "policy-gradient"


def test_presets_hold_their_papers_numbers() -> None:
    made = {name: resolve(name=name) for name in launch.presets() if name != "pocket"}
    assert (made["grpo"].loss.aggregation, made["grpo"].loss.kl_coef) == ("seq-mean-token-mean", 0.04)
    assert (made["dr_grpo"].estimator, made["dr_grpo"].loss.aggregation) == (
        "dr_grpo", "seq-mean-token-sum-norm",
    )  # fmt: skip
    assert (made["dapo"].loss.clip_high, made["dapo"].loss.kl_coef) == (0.28, 0)
    assert made["rloo"].estimator == "rloo"
    assert made["reinforce_plus_plus"].kl_in_reward == 0.01


def test_methods_bring_their_own_section_alone() -> None:
    plain, (_, both) = resolve(name="dapo"), launch.resolve("dapo", overrides=BASE, added=["gigpo"])
    assert isinstance(both, PolicyGradientConfig)
    assert plain.gigpo is None and both.gigpo is not None and both.gigpo.gamma == 0.95
    assert both.loss == plain.loss and both.estimator == plain.estimator
    with pytest.raises(UnknownName, match="method 'gigqo'"):
        launch.resolve("grpo", overrides=BASE, added=["gigqo"])
    with pytest.raises(ConfigError, match="within groups"):
        launch.resolve("reinforce_plus_plus", overrides=BASE, added=["gigpo"])


def test_an_unknown_algorithm_names_the_nearest() -> None:
    with pytest.raises(UnknownName) as caught:
        launch.resolve("gropo")
    assert "grpo" in str(caught.value) + caught.value.hint


def test_what_is_saved_reproduces_the_config_without_secrets(tmp_path: Path) -> None:
    config = resolve("env.kwargs.api_key=hunter22", "loss.kl_coef=0.5", "rollout.stop=['a']")
    configuration.save(config, tmp_path / "config.toml")
    text = (tmp_path / "config.toml").read_text()
    assert "hunter22" not in text
    saved = tomllib.loads(text)
    assert saved["env"]["kwargs"]["api_key"] == "***"
    assert launch.reopen(tmp_path, ["env.kwargs.api_key=hunter22"])[1] == config
    with pytest.raises(UsageError, match="a secret and was not saved") as caught:
        launch.reopen(tmp_path)
    assert "env.kwargs.api_key=" in caught.value.hint
    with pytest.raises(UsageError, match="its own settings"):
        launch.reopen(tmp_path, ["env.kwargs.api_key=hunter22", "steps=3"])


def test_a_list_is_asked_for_as_one() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve("trackers=wandb")
    assert 'trackers=["…"]' in caught.value.hint


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("steps = 3\n", encoding="utf-8-sig")
    assert configuration.read_toml(tmp_path / "c.toml") == {"steps": 3}
