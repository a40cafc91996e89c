"""Ids of environments, in Gymnasium's own registry.

Invariant: registering imports no family; a family is imported when one of its ids is made. An unknown id
lists the near ones.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import gymnasium
from gymnasium.envs.registration import registry as gymnasium_registry

from agentgym import plugins
from agentgym.env import Env
from agentgym.errors import MissingDependency, UnknownName, UsageError
from agentgym.redaction import redact

NAMESPACE = "agentgym"


@dataclass(frozen=True, slots=True)
class Family:
    """What is known of an id without importing it.

    Attributes:
        id: ``namespace/Name-vN``.
        entry_point: ``package.module:Class``.
        extra: The extra that holds its dependencies.
        summary: One line.
        kwargs: Arguments of the class.
        episodes: How many an evaluation takes where none are asked for.
    """

    id: str
    entry_point: str
    extra: str = ""
    summary: str = ""
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    episodes: int = 100


_families: dict[str, Family] = {}


def register(
    id: str,
    entry_point: str,
    *,
    extra: str = "",
    summary: str = "",
    kwargs: Mapping[str, Any] | None = None,
    episodes: int = 100,
) -> None:
    """Register an environment under a versioned id.

    Args:
        id: ``namespace/Name-vN``.
        entry_point: ``package.module:Class``, a subclass of :class:`agentgym.Env`.
        extra: The extra of ``agentgym-llm`` that holds its dependencies, if any.
        summary: One line for ``agentgym list``.
        kwargs: Arguments of the class.
        episodes: How many an evaluation takes where none are asked for: the whole split, where a benchmark's
            score is over all of it.

    Raises:
        UsageError: The id has no version, or another entry point holds it.
    """
    family = Family(id, entry_point, extra, summary, dict(kwargs or {}), episodes)
    if "-v" not in id:
        raise UsageError(f"the id {id!r} has no version", hint=f"call it {id}-v0")
    if id in _families and _families[id] != family:
        raise UsageError(f"{id!r} is already registered for {_families[id].entry_point}")
    known = gymnasium_registry.get(id)
    if known is not None and known.entry_point != entry_point:
        raise UsageError(f"{id!r} is already registered with Gymnasium for {known.entry_point}")
    _families[id] = family
    if known is None:
        gymnasium.register(id=id, entry_point=entry_point, order_enforce=False, kwargs=dict(family.kwargs))


def families() -> dict[str, Family]:
    """Every registered id: built-in ones and those of installed plug-ins, by id."""
    plugins.load_environments()
    return dict(sorted(_families.items()))


def resolve(id: str) -> str:
    """``id`` as Gymnasium knows it: plug-ins are loaded, a bare name gets the ``agentgym/`` namespace.

    Raises:
        UnknownName: No such id.
    """
    id = id.removeprefix("agentgym:")
    for candidate in (id, f"{NAMESPACE}/{id}"):
        if candidate in gymnasium_registry:
            return candidate
    plugins.load_environments()
    for candidate in (id, f"{NAMESPACE}/{id}"):
        if candidate in gymnasium_registry:
            return candidate
    near = {i.removeprefix(f"{NAMESPACE}/") if "/" not in id else i: i for i in _families}
    raise UnknownName("environment", id, near, hint="`agentgym list` shows all ids")


def make(id: str, **kwargs: Any) -> gymnasium.Env[Any, Any]:
    """Make an environment.

    Args:
        id: A registered id (``agentgym/`` may be left out), any Gymnasium id whose package is imported, or
            an import path ``package.module:Class``.
        **kwargs: Arguments of the class.

    Returns:
        The environment as ``gymnasium.make`` wraps it, without the passive checker
        (``agentgym check`` is the thorough one) and without the order enforcer (:class:`agentgym.Env`
        enforces order itself).

    Raises:
        UnknownName: No such id, or the class has no such argument; the near ones are listed.
        MissingDependency: The family's packages are not installed; the extra is named.
    """
    if ":" in id and not id.startswith("agentgym:"):
        with _teaching(id, None, kwargs):
            return plugins.import_path(id)(**kwargs)  # type: ignore[no-any-return]
    name = resolve(id)
    family = _families.get(name)
    with _teaching(name, family, kwargs):
        if family is None:
            return gymnasium.make(name, **kwargs)
        return gymnasium.make(name, disable_env_checker=True, **kwargs)


@contextmanager
def _teaching(name: str, family: Family | None, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Turn Python's errors about arguments and missing packages into ours."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or str(error)).split(".")[0]
        if family is not None and family.extra and missing != "agentgym":
            raise MissingDependency(missing, family.extra) from error
        raise
    except TypeError as error:
        refused = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if refused is None or refused[1] not in kwargs:
            given = ", ".join(f"{key}={value!r}" for key, value in redact(kwargs).items())
            error.add_note(f"while making {name} with {given or 'no arguments'}")
            raise
        factory: Any = gymnasium_registry[name].entry_point if name in gymnasium_registry else name
        if isinstance(factory, str):
            factory = plugins.import_path(factory)
        # A class's own signature is that of Env.__new__, which takes everything.
        called = factory.__init__ if isinstance(factory, type) else factory  # type: ignore[misc]
        takes = [p for p in inspect.signature(called).parameters if p != "self"]
        raise UnknownName(f"argument of {name}", refused[1], takes) from error


def base(env: gymnasium.Env[Any, Any]) -> Env[Any]:
    """The :class:`agentgym.Env` under ``env``'s wrappers.

    Raises:
        UsageError: The base is another kind of environment.
    """
    inner = env.unwrapped
    if not isinstance(inner, Env):
        known = inner.spec.id if inner.spec is not None else "its id"
        raise UsageError(
            f"{type(inner).__name__} is no agentgym.Env",
            hint=f"make it as agentgym/Gymnasium-v0 with env_id={known}",
        )
    return inner
