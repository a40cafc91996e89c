"""From a name and overrides to a run: find the preset and the algorithm, resolve the config, train.

Invariant: a preset is a TOML file of settings over one algorithm's defaults; files and overrides come after
it, and what results is saved with the run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from agentgym import config as configuration
from agentgym import plugins
from agentgym.errors import UnknownName, UsageError
from agentgym.journal import FILE, header
from agentgym.redaction import MASK
from agentgym.trainers import ALGORITHMS
from agentgym.trainers.config import TrainConfig
from agentgym.trainers.run import Algorithm, Progress, Run, Silent


def presets() -> dict[str, Path]:
    """The shipped presets by name."""
    folder = Path(str(files("agentgym.trainers"))) / "presets"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def resolve(
    name: str, sources: Sequence[Path] = (), overrides: Sequence[str] = (), added: Sequence[str] = ()
) -> tuple[Algorithm, TrainConfig]:
    """The algorithm and config of a preset or algorithm called ``name``.

    Args:
        name: A preset, a built-in or plugged-in algorithm, or an import path ``package.module:name``.
        sources: TOML files laid over the preset.
        overrides: ``a.b=value``, laid over the files.
        added: Methods to combine it with; each brings the section of its own preset, under the files.

    Raises:
        UnknownName: No such preset, algorithm or method.
        ConfigError: An unknown key or a wrong value.
    """
    layers: list[Any] = []
    algorithm_name = name
    shipped = presets()
    if name in shipped:
        preset = configuration.read_toml(shipped[name])
        algorithm_name = preset["algorithm"]
        layers.append(preset)
    elif name not in ALGORITHMS and name not in plugins.declared("algorithms") and ":" not in name:
        known = {*shipped, *ALGORITHMS, *plugins.declared("algorithms")}
        raise UnknownName("algorithm", name, known, hint="or give package.module:name")
    layers += [_section(method, shipped) for method in added]
    algorithm = plugins.find("algorithms", algorithm_name, ALGORITHMS, "algorithm")
    if not isinstance(algorithm, Algorithm):
        raise UsageError(
            f"{algorithm_name!r} is a {type(algorithm).__name__}, not an algorithm",
            hint="an algorithm is an agentgym.trainers.run.Algorithm(config, train)",
        )
    return algorithm, configuration.load(
        algorithm.config, [{"algorithm": algorithm_name}, *layers, *sources], overrides
    )


def _section(method: str, shipped: Mapping[str, Path]) -> dict[str, Any]:
    """What ``--with METHOD`` lays over a preset: the method's own section, without its base's numbers."""
    from agentgym.trainers.policy_gradient import METHODS

    if method not in METHODS:
        raise UnknownName("method", method, METHODS, hint="--with takes methods, the name before it a base")
    preset = configuration.read_toml(shipped[method])
    added = {method: preset[method]}
    if method == "ppo":  # its advantages are an estimator of their own
        added["estimator"] = preset["estimator"]
    return added


def reopen(folder: Path, overrides: Sequence[str] = ()) -> tuple[Algorithm, TrainConfig]:
    """The algorithm and config that a run's folder was started with.

    Args:
        folder: The run's.
        overrides: ``a.b=value`` for the secrets, which were not saved; nothing else can change.

    Raises:
        UsageError: The folder holds no run, a secret is missing, or an override is of something else.
    """
    saved = _saved(folder)
    algorithm = plugins.find("algorithms", saved["algorithm"], ALGORITHMS, "algorithm")
    masked, given = set(_masked(saved)), {text.partition("=")[0].strip() for text in overrides}
    if strange := sorted(given - masked):
        raise UsageError(
            f"a run is resumed with its own settings, and {strange[0]} is one of them",
            hint="start a new run, from this one's model if you like: model=" + str(folder / "model"),
        )
    if missing := sorted(masked - given):
        raise UsageError(
            f"{missing[0]} is a secret and was not saved with the run", hint=f"add {missing[0]}=…"
        )
    return algorithm, configuration.load(algorithm.config, [saved], overrides)


def _saved(folder: Path) -> Mapping[str, Any]:
    """The config of a run's folder; that of its journal if the run died before it wrote the file."""
    path = folder / "config.toml"
    if path.exists():
        return configuration.read_toml(path)
    begun = header(folder) if (folder / FILE).exists() else {}
    if begun.get("kind") == "train":
        return _without_none(begun["config"])
    raise UsageError(
        f"{folder} holds no run to resume",
        hint=f"agentgym eval --resume {folder}" if begun else "name the folder that --out created",
    )


def _without_none(table: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_none(value) if isinstance(value, Mapping) else value
        for key, value in table.items()
        if value is not None
    }


def _masked(table: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _masked(value, f"{prefix}{key}.")
        elif _holds_mask(value):
            yield f"{prefix}{key}"


def _holds_mask(value: Any) -> bool:
    """Of the setting, one of its words or the user of its address; three asterisks alone may be a text's."""
    if isinstance(value, list):
        return any(map(_holds_mask, value))
    return isinstance(value, str) and (value == MASK or f"://{MASK}@" in value)


def launch(
    algorithm: Algorithm,
    config: TrainConfig,
    folder: Path,
    *,
    resume: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Train; return the folder of the trained model.

    Raises:
        AgentGymError: What stopped the run; it can be resumed from its folder.
    """
    if algorithm.prepare is not None:
        config = algorithm.prepare(config, progress or Silent())
    with Run(config, folder, resume=resume, progress=progress) as run:
        asyncio.run(algorithm.train(config, run))
        return run.export()
