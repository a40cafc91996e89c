"""One way to configure: a typed config, a TOML file, ``a.b=value`` overrides, the resolved config saved.

Invariant: an unknown key or a value of the wrong type is an error that names the nearest known key; what
is saved with a run reproduces it, with keys and tokens blanked out.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from agentgym.errors import ConfigError, nearest
from agentgym.redaction import redact

C = TypeVar("C", bound="Config")


class Config(BaseModel):
    """Base of every config: frozen, no unknown keys.

    Class attributes:
        shorthand: The key that a bare value stands for: ``env=ID`` means ``env.id=ID``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
    shorthand: ClassVar[str | None] = None

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, value: Any) -> Any:
        if cls.shorthand is not None and not isinstance(value, Mapping | BaseModel):
            return {cls.shorthand: value}
        return value


def load(cls: type[C], sources: Iterable[Mapping[str, Any] | Path], overrides: Sequence[str] = ()) -> C:
    """A config from layers, later ones over earlier ones.

    Args:
        cls: The config's class.
        sources: Mappings, or TOML files.
        overrides: ``a.b=value``; the value is read as TOML, and as a plain string where that fails.

    Raises:
        ConfigError: An unknown key, a wrong value, an unreadable file.
    """
    merged: dict[str, Any] = {}
    for source in sources:
        merge(cls, merged, read_toml(source) if isinstance(source, Path) else source)
    for override in overrides:
        merge(cls, merged, parse_override(override))
    try:
        return cls.model_validate(merged)
    except ValidationError as error:
        raise _explain(cls, error) from error


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        ConfigError: It is not there, or no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no TOML: {error}") from error


def parse_override(text: str) -> dict[str, Any]:
    """``a.b=value`` as nested tables.

    Raises:
        ConfigError: There is no ``=``, or no key before it.
    """
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(
            f"cannot read the override {text!r}", hint="write key=value, for example optimiser.lr=1e-5"
        )
    try:
        parsed: Any = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value
    for part in reversed(parts):
        parsed = {part: parsed}
    return parsed  # type: ignore[no-any-return]


def merge(cls: type[Config] | None, target: dict[str, Any], extra: Mapping[str, Any]) -> None:
    """Lay ``extra`` over ``target`` in place, table by table; a bare value is expanded by its shorthand."""
    for key, value in extra.items():
        nested = _nested(cls, key)
        if nested is not None and nested.shorthand is not None and value is not None:
            value = value if isinstance(value, Mapping) else {nested.shorthand: value}
        if isinstance(value, Mapping) and isinstance(target.get(key), dict):
            merge(nested, target[key], value)
        elif isinstance(value, Mapping):
            target[key] = {}
            merge(nested, target[key], value)
        else:
            target[key] = value


def save(config: Config, path: Path) -> None:
    """Write the resolved config as TOML; keys and tokens are blanked out.

    Raises:
        MissingDependency: ``tomli-w`` is not installed.
    """
    try:
        import tomli_w
    except ModuleNotFoundError as error:
        from agentgym.errors import MissingDependency

        raise MissingDependency("tomli-w", "train") from error
    data = redact(config.model_dump(mode="json", exclude_none=True))
    path.write_text(tomli_w.dumps(data), encoding="utf-8")


def _nested(cls: type[BaseModel] | None, key: str) -> type[Config] | None:
    if cls is None or key not in cls.model_fields:
        return None
    annotation = cls.model_fields[key].annotation
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Config):
            return candidate
    return None


def _explain(cls: type[Config], error: ValidationError) -> ConfigError:
    lines, hints = [], []
    for item in error.errors():
        path = [str(part) for part in item["loc"]]
        if item["type"] == "extra_forbidden":
            owner: type[BaseModel] | None = cls
            for part in path[:-1]:
                owner = _nested(owner, part)
            known = [".".join([*path[:-1], k]) for k in (owner.model_fields if owner else ())]
            lines.append(f"unknown key {'.'.join(path)!r}")
            near = nearest(".".join(path), known)
            hints.append(
                f"did you mean {' or '.join(near)}?" if near else f"known keys: {', '.join(known[:20])}"
            )
        else:
            lines.append(f"{'.'.join(path) or 'config'}: {item['msg']}, not {item['input']!r}"[:300])
    return ConfigError("; ".join(lines), hint=" ".join(hints))
