"""KL divergence from a reference policy, estimated on sampled tokens.

With ``d = log pi - log pi_ref`` on a token that ``pi`` sampled (Schulman, Approximating KL Divergence):

=======  ======================  ==========================================================================
k1       ``d``                   unbiased; as a loss its on-policy gradient is zero in expectation
abs      ``|d|``
k2       ``d^2 / 2``             biased value, correct on-policy gradient
k3       ``exp(-d) + d - 1``     unbiased, never negative
name +   value of the name       gradient of k2, straight through
=======  ======================  ==========================================================================

Invariant: ``d`` is clamped to [-20, 20] before it is exponentiated and k3 to at most 10, so no token makes an
estimate overflow. A penalty stands either in the reward (`agentgym.trainers.reward_shaping`) or in the loss
(`agentgym.trainers.policy_loss`).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from agentgym.errors import UnknownName

KLEstimator = Literal["k1", "k2", "k3", "abs", "k1+", "k3+", "abs+"]
KL_ESTIMATORS: tuple[KLEstimator, ...] = get_args(KLEstimator)

_LARGEST_LOG_RATIO = 20.0
_LARGEST_K3 = 10.0


def kl_estimate(logp: Tensor, logp_ref: Tensor, estimator: KLEstimator = "k3") -> Tensor:
    """Estimate the divergence on every token.

    Args:
        logp: Any shape; the policy's log-probs, with gradient where the estimate is a loss.
        logp_ref: Same shape; the reference's. Never receives a gradient.
        estimator: One of `KL_ESTIMATORS`.

    Returns:
        Same shape. Nothing is masked here.

    Raises:
        UnknownName: No such estimator.
    """
    if estimator not in KL_ESTIMATORS:
        raise UnknownName("KL estimator", estimator, KL_ESTIMATORS)
    d = logp - logp_ref.detach()
    k2 = 0.5 * d**2
    if estimator.endswith("+"):
        # The bracket is exactly 0 in value: only its gradient remains.
        return _value(d.detach(), estimator[:-1]) + (k2 - k2.detach())
    return _value(d, estimator)


def _value(d: Tensor, estimator: str) -> Tensor:
    if estimator == "k1":
        return d
    if estimator == "abs":
        return d.abs()
    if estimator == "k2":
        return 0.5 * d**2
    bounded = d.clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)
    # expm1 keeps k3 >= 0 near d = 0, where exp(-d) - 1 + d cancels.
    return (torch.expm1(-bounded) + bounded).clamp(max=_LARGEST_K3)
