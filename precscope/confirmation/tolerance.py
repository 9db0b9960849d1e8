"""What a plan may change. No torch is needed to say so."""

from __future__ import annotations

from dataclasses import dataclass

LEAST_GAIN = 0.03
"""Share of the time per step that a plan must gain for leaving autocast."""


@dataclass(frozen=True)
class Tolerance:
    """What a plan may change against fp32.

    loss: share of the loss. span: share of the largest loss of the run, added to it (a loss of nearly zero has large
    relative errors). gradient: relative error of the whole gradient. parameter, elements: at most a share `elements` of
    all trained elements may lie in parameters whose own gradient is off by more than `parameter`. output: relative
    error of the output at inference. order: share of pairs of output values, clearly ordered in fp32, that become
    equal or change places.
    """

    loss: float = 0.1
    span: float = 0.01
    gradient: float = 0.15
    parameter: float = 0.3
    elements: float = 0.1
    output: float = 0.05
    order: float = 0.2
