"""Schedules: numbers that change with the training step, and with nothing else.

Invariant: a schedule is a pure function of the step and of lengths that the config names, so a resumed run
continues it with its step counter alone. Lengths are in the unit of the step (the trainer's collections).
"""

from __future__ import annotations

import math

from agentgym.errors import UsageError


def cosine_up(step: float, length: float) -> float:
    """SPEAR's warm-up of self-imitation, ``gamma_t = (1 - cos(pi t / T)) / 2``, and 1 from T on.

    Source: Qin et al. 2025, SPEAR. A length of 0 is 1 throughout.

    Raises:
        UsageError: A negative step or length.
    """
    return 0.5 * (1.0 - math.cos(math.pi * _share(step, length)))


def cosine_down(step: float, length: float) -> float:
    """SPEAR's decay of the intrinsic reward, ``mu_t = (1 + cos(pi t / T)) / 2``, and 0 from T on.

    Source: Qin et al. 2025, SPEAR. A length of 0 is 0 throughout.

    Raises:
        UsageError: A negative step or length.
    """
    return 0.5 * (1.0 + math.cos(math.pi * _share(step, length)))


def epo_beta(step: float, middle: float, gamma: float = 1.0) -> float:
    """EPO's phase weight as its authors state it, ``beta_k = 1 + exp(-gamma k / k_mid)``: from 2 towards 1.

    Source: Xu et al. 2025, EPO; ``k_mid`` is near 60 % of the training steps.

    Args:
        step: k.
        middle: k_mid; above 0.
        gamma: How fast it falls.

    Raises:
        UsageError: A negative step, or a ``middle`` that is not positive.
    """
    _share(step, middle)
    if middle <= 0:
        raise UsageError(f"k_mid must be positive, got {middle}", hint="60 % of the training steps is usual")
    return 1.0 + math.exp(-gamma * step / middle)


def epo_release_weight(step: float, steps: float) -> float:
    """The phase weight that EPO's release computes: slowly from 1 to 0.83, then quickly to 0.04.

    With ``h = K / 2``: ``1 - 0.2 (1 - exp(-2 k / h))`` for ``k <= h``, then ``0.8 exp(-3 (k - h) / h)``. The
    two pieces do not meet: at ``h`` it steps down from 0.827 to 0.8. The release fixes K at 150; here it is
    the run's length.

    Args:
        step: k.
        steps: K, the training steps of the whole run; above 0.

    Raises:
        UsageError: A negative step, or no steps.
    """
    _share(step, steps)
    if steps <= 0:
        raise UsageError(f"the schedule's length must be positive, got {steps}", hint="pass the run's steps")
    half = steps / 2
    if step <= half:
        return 1.0 - 0.2 * (1.0 - math.exp(-2.0 * step / half))
    return 0.8 * math.exp(-3.0 * (step - half) / half)


def _share(step: float, length: float) -> float:
    """How much of ``length`` is behind at ``step``, in [0, 1]."""
    if step < 0 or length < 0:
        raise UsageError(
            f"a schedule at step {step} of {length}", hint="steps count from 0, lengths are not negative"
        )
    return 1.0 if step >= length else step / length
