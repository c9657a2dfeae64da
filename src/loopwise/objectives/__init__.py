"""Losses over loops: how many loops to run, which count, and what the exit gate learns."""

from loopwise.objectives.base import LoopPlan, Objective, ObjectiveInputs
from loopwise.objectives.calibration import Calibration, ContinuationLabels, continuation_labels
from loopwise.objectives.every_loop import EveryLoop
from loopwise.objectives.expected import ExpectedLoss
from loopwise.objectives.head import TokenLosses, token_losses
from loopwise.objectives.last_loop import LastLoop
from loopwise.objectives.loss import ObjectiveLoss, objective_loss
from loopwise.objectives.random_depth import RandomDepth
from loopwise.objectives.registry import OBJECTIVES, build_objective

__all__ = [
    "OBJECTIVES",
    "Calibration",
    "ContinuationLabels",
    "EveryLoop",
    "ExpectedLoss",
    "LastLoop",
    "LoopPlan",
    "Objective",
    "ObjectiveInputs",
    "ObjectiveLoss",
    "RandomDepth",
    "TokenLosses",
    "build_objective",
    "continuation_labels",
    "objective_loss",
    "token_losses",
]
