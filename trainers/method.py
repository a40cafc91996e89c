"""Methods: what an algorithm adds to the policy-gradient loop, hook by hook.

Invariant: a hook that a method leaves alone changes nothing, bit for bit; so a method whose coefficients are
all zero is its base. Methods compose: each sees what those before it made of rewards and advantages.

The loop calls the hooks of a step in this order::

    shape -> advantages -> before -> (term, beside -> optimiser step -> after_update) per minibatch -> finish
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from agentgym.errors import ConfigError
from agentgym.trainers.aggregation import Denominators
from agentgym.trainers.batch import Batch, Row
from agentgym.trainers.collect import Collection
from agentgym.trainers.learner import Loss, Outputs

if TYPE_CHECKING:
    from agentgym.trainers.policy_gradient import PolicyGradientConfig
    from agentgym.trainers.run import Run

Here = Callable[[Tensor], Tensor]
Term = Callable[[Batch, Outputs, Here], tuple[Tensor, Mapping[str, Tensor]]]


@dataclass(slots=True)
class Step:
    """One step of a run, as methods see it.

    Attributes:
        number: From 0; what schedules count.
        collection: The trajectories that are trained on, and their units and tensors.
        whole: All rows of the collection as one batch, ``[B, T]``.
        rewards: ``[N]``; shaped.
        rows: The rows that are in the loss: those of the collection that no filter took out.
        old: ``[B, T-1]`` log-probs before the update; ``None``: the policy has not moved since sampling.
        ref: ``[B, T-1]`` log-probs of the reference, where there is one.
        divergence: ``[B, T-1]`` k1 of policy and reference, with ``kl_in_reward``.
        metrics: What is logged of the step; hooks add to it.
    """

    number: int
    collection: Collection
    whole: Batch
    rewards: Tensor
    rows: list[Row]
    old: Tensor | None = None
    ref: Tensor | None = None
    divergence: Tensor | None = None
    metrics: dict[str, float] = field(default_factory=dict)


class Method:
    """An algorithm's additions to the loop; every hook does nothing by default.

    Args:
        config: The run's.
        run: The run, open. Register further models here, with ``run.add_learner``.

    Attributes:
        name: The section of the config that switches the method on.
        refuses: Methods that it cannot be combined with, and why.
        needs_old: ``Step.old`` has to be there, on-policy too.
        with_entropy: The term reads exact entropies.
        acts: The term has a gradient where advantages are 0: no row may be left out.
    """

    name: ClassVar[str]
    refuses: ClassVar[Mapping[str, str]] = {}
    needs_old = False
    with_entropy = False
    acts = False

    def __init__(self, config: PolicyGradientConfig, run: Run) -> None:
        self.config, self.run = config, run

    @classmethod
    def check(cls, config: PolicyGradientConfig) -> None:
        """Refuse settings that contradict the method, before anything is started.

        Raises:
            ConfigError: Which, and what to do.
        """

    def shape(self, number: int, collection: Collection, rewards: Tensor) -> Tensor:
        """Rewards ``[N]`` of step ``number`` before advantages are taken. It may be called more than once."""
        return rewards

    def advantages(self, step: Step, tokens: Tensor) -> Tensor:
        """Token advantages ``[B, T-1]`` from those so far."""
        return tokens

    def before(self, step: Step, tokens: Tensor) -> None:
        """Before the first optimiser step, with the final advantages ``[B, T-1]``."""

    def term(self, step: Step, chosen: Sequence[Row], denominators: Denominators) -> Term | None:
        """What one optimiser step over ``chosen`` adds to the policy loss.

        Returns:
            A function of a micro-batch, the model's outputs and ``here`` (which brings a ``[B, T-1]`` tensor
            of the whole collection to the micro-batch) to its share of the term, divided by ``denominators``,
            and metrics that add up over micro-batches; or ``None``.
        """
        return None

    def beside(self, step: Step, epoch: int, part: int) -> tuple[Sequence[Row], Loss] | None:
        """Rows of other steps that take part in an optimiser step, and their loss, which is added.

        Args:
            step: The present one.
            epoch: Pass over the collection, from 0.
            part: Optimiser step of that pass, from 0.
        """
        return None

    def after_update(self, step: Step, chosen: Sequence[Row]) -> None:
        """After the policy's optimiser step over ``chosen``."""

    def finish(self, step: Step, tokens: Tensor) -> None:
        """After the last optimiser step; further ones over other rows are made here."""

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state`."""


def refuse_conflicts(methods: Mapping[str, type[Method]], config: PolicyGradientConfig) -> None:
    """Check that the methods switched on in ``config`` go together.

    Raises:
        ConfigError: Two of them do not; the reason is named.
    """
    chosen = [name for name in methods if getattr(config, name) is not None]
    for name in chosen:
        for other in chosen:
            if other in methods[name].refuses:
                raise ConfigError(
                    f"{name} cannot be combined with {other}: {methods[name].refuses[other]}",
                    hint=f"leave out [{name}] or [{other}]",
                )
    for name in chosen:
        methods[name].check(config)
