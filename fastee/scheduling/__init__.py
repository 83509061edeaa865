"""Who runs what next, and when to stop: QoS, Profile, profile(), Scheduler."""

from fastee.scheduling.decision import Action, Decision
from fastee.scheduling.links import parse_link
from fastee.scheduling.profile import Profile, profile
from fastee.scheduling.qos import QoS
from fastee.scheduling.scheduler import POLICIES, Scheduler

__all__ = ["Action", "Decision", "POLICIES", "Profile", "QoS", "Scheduler", "parse_link", "profile"]
