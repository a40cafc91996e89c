"""One way to configure: a typed config, a TOML file, ``a.b=value`` overrides, the resolved config saved.

Invariant: an unknown key or a value of the wrong type is an error that names the nearest known key; what
is saved with a run reproduces it, with keys and tokens blanked out.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from agentgym.errors import ConfigError, nearest
from agentgym.paths import atomic_write
from agentgym.redaction import redact

C = TypeVar("C", bound="Config")


class Config(BaseModel):
    """Base of every config: frozen, no unknown keys.

    Class attributes:
        shorthand: The key that a bare value stands for: ``env=ID`` means ``env.id=ID``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)
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
        raise _explain(error) from error


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        ConfigError: It is not there, or no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(
            f"cannot read the config {path}: {error.strerror}", hint="name a TOML file that can be read"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} is no TOML: {error}", hint="write key = value lines under [section] headings"
        ) from error


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


def merge(
    cls: type | None, target: dict[str, Any], extra: Mapping[str, Any], path: tuple[str, ...] = ()
) -> None:
    """Lay ``extra`` over ``target`` in place, table by table; a bare value is expanded by its shorthand.

    Raises:
        ConfigError: ``cls`` has no such key; the nearest ones are named.
    """
    fields = _fields(cls)
    for key, value in extra.items():
        if fields is not None and key not in fields:
            raise _unknown_key((*path, key), fields)
        nested = _section(fields[key]) if fields is not None else None
        shorthand = getattr(nested, "shorthand", None)
        if shorthand is not None and value is not None and not isinstance(value, Mapping):
            value = {shorthand: value}
        if isinstance(value, Mapping):
            if not isinstance(target.get(key), dict):
                target[key] = {}
            merge(nested, target[key], value, (*path, key))
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
    with atomic_write(path) as building:
        building.write_text(tomli_w.dumps(data), encoding="utf-8")


def _fields(cls: type | None) -> dict[str, Any] | None:
    """The annotations of a section's keys; ``None`` for a table with free keys."""
    if cls is None:
        return None
    if issubclass(cls, BaseModel):
        return {name: field.annotation for name, field in cls.model_fields.items()}
    return dict(get_type_hints(cls))


def _section(annotation: Any) -> type | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and (issubclass(candidate, BaseModel) or is_dataclass(candidate)):
            return candidate
    return None


def _unknown_key(path: tuple[str, ...], known: Mapping[str, Any]) -> ConfigError:
    *prefix, key = path
    deeper = [f"{name}.{key}" for name, value in known.items() if key in (_fields(_section(value)) or ())]
    near = [".".join((*prefix, name)) for name in [*deeper, *nearest(key, known)]]
    listed = ", ".join(".".join((*prefix, name)) for name in known)
    return ConfigError(
        f"unknown key {'.'.join(path)!r}",
        hint=f"did you mean {' or '.join(near)}?" if near else f"known keys: {listed}",
    )


def _explain(error: ValidationError) -> ConfigError:
    lines, missing, lists, wrong = [], [], [], []
    for item in error.errors():
        name, kind = ".".join(map(str, item["loc"])), item["type"]
        got = "" if kind == "missing" else f", got {item['input']!r}"[:200]
        lines.append(f"{name or 'config'}: {item['msg']}{got}")
        if kind == "missing":
            missing.append(f"set {name}=…")
        elif kind in ("tuple_type", "list_type"):
            lists.append(f'write {name}=["…"]')
        else:
            wrong.append(f"give {name or 'it'} another value")
    return ConfigError("; ".join(lines), hint=", ".join(missing + lists + wrong))
