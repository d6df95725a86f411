"""From a sample of traffic and a target to a profile."""

from jointkv.evaluate.calibrate.run import MIN_HALF, Calibration, Progress, TargetUnmet, check_requests, too_few
from jointkv.evaluate.calibrate.settings import CalibrationSettings, policy_of

__all__ = [
    "MIN_HALF",
    "Calibration",
    "CalibrationSettings",
    "Progress",
    "TargetUnmet",
    "check_requests",
    "policy_of",
    "too_few",
]
