"""Who runs what next, and when to stop: QoS, Profile, profile(), Scheduler, rules of your own."""

from fastee.scheduling.costs import Costs
from fastee.scheduling.decision import Action, Decision
from fastee.scheduling.links import parse_link
from fastee.scheduling.params import POLICIES
from fastee.scheduling.profile import Profile, profile
from fastee.scheduling.qos import QoS
from fastee.scheduling.rules import policy, rule
from fastee.scheduling.scheduler import Scheduler

__all__ = ["Action", "Costs", "Decision", "POLICIES", "Profile", "QoS", "Scheduler", "parse_link", "policy", "profile", "rule"]
