"""The numbers that each policy reads, with their defaults and limits (sources in docs/scheduler.md): checked once, at construction."""

from __future__ import annotations

import math
import operator
import warnings

from fastee.errors import did_you_mean

_BIG = 1 << 40
_CHOICES = {"adapt": ("none", "rate", "threshold"), "range": ("avg", "min_max", "threshold"), "mode": ("eval", "train"),
            "batch_mode": ("per_sample", "all")}  # fmt: skip

# name -> (default, lowest, highest); a default of bool, str or list stands for that kind
_MDI_EXIT = {
    "adapt": "none", "raw_offload": True, "t_o": (10, 0, _BIG), "t_q1": (5, 0, _BIG), "t_q2": (20, 1, _BIG), "q_max": (1000, 1, _BIG),
    "takeover": (4, 1, _BIG), "a": (0.2, 0.0, 1.0), "b": (0.1, 0.0, 1.0), "z": (0.2, 1e-9, 1.0), "period": (0.5, 1e-6, 1e6),
    "t_min": (0.5, 1e-9, 1.0), "t_max": (0.99, 1e-9, 1e9), "mu": (0.01, 1e-9, 1e6), "mu_min": (1e-3, 1e-9, 1e6), "mu_max": (10.0, 1e-9, 1e6),
    "weight": (0.2, 1e-6, 1.0), "report_age": (3.0, 0.0, 1e6),
}  # fmt: skip
PARAMS: dict[str, dict] = {
    "deadline": {},
    "threshold": {},
    "patience": {"patience": (2, 1, 1024)},
    "distree": {"delta": [0.51], "students": True},
    "mdi_exit": _MDI_EXIT,
    "dimee": {"alpha": (0.75, 0.0, math.inf), "tiers": [], "cuts": []},
    "splitee": {"alpha": (0.75, 0.0, math.inf), "layer_cost": (0.1, 0.0, 1e6), "offload_cost": (0.3, 0.0, 1e6), "explore": (1.0, 0.0, 1e6),
                "cloud": (-1, -1, 1023), "side_information": False},
    "jei_gate": {},
    "daisy": {"mode": "eval", "range": "avg", "u_threshold": (0.5, -math.inf, math.inf), "inf_threshold": (0.2, 0.0, 1.0), "counts": [],
              "batch_mode": "per_sample"},
    "custom": {},
}  # fmt: skip
POLICIES = tuple(name for name in PARAMS if name != "custom")


def check_params(policy: str, given, nodes: int, exits: int) -> dict:
    """Return every number of `policy` for the cores; unknown names, wrong types and values out of range raise."""
    if given is None:
        given = {}
    if not isinstance(given, dict):
        raise TypeError(f"Scheduler: params must be a dict, got {type(given).__name__}")
    known = PARAMS[policy]
    for name in given:
        if name not in known:
            have = f"the params of policy {policy!r} are {sorted(known)}" if known else f"policy {policy!r} has none"
            raise ValueError(f"Scheduler: params has no {name!r}; {have}{did_you_mean(str(name), known)}")
    out = {}
    for name, spec in known.items():
        value = given.get(name, spec[0] if isinstance(spec, tuple) else spec)
        if isinstance(spec, bool):
            if not isinstance(value, bool):
                raise TypeError(f"Scheduler: params[{name!r}] must be a bool, got {type(value).__name__}")
        elif isinstance(spec, str):
            if value not in _CHOICES[name]:
                raise ValueError(f"Scheduler: params[{name!r}] must be one of {list(_CHOICES[name])}, got {value!r}")
            value = _CHOICES[name].index(value)
        elif isinstance(spec, tuple):
            value = _number(name, value, *spec)
        out[name] = value
    _FINISH.get(policy, lambda out, nodes, exits: None)(out, nodes, exits)
    return out


def _number(name: str, value, default, low, high):
    whole = isinstance(default, int)
    if isinstance(value, bool) or not hasattr(value, "__index__" if whole else "__float__"):
        raise TypeError(f"Scheduler: params[{name!r}] must be {'an int' if whole else 'a number'}, got {type(value).__name__}")
    value = operator.index(value) if whole else float(value)
    if not low <= value <= high:
        raise ValueError(f"Scheduler: params[{name!r}] must be in {low}..{high}, got {value}")
    return value


def _numbers(name: str, value, count: int, kind, low, high) -> list:
    try:
        values = [kind(v) for v in value]
    except TypeError:
        raise TypeError(f"Scheduler: params[{name!r}] must be a sequence of numbers, got {type(value).__name__}") from None
    if len(values) != count:
        raise ValueError(f"Scheduler: params[{name!r}] must hold {count} numbers, got {len(values)}")
    for v in values:
        if not low <= v <= high:
            raise ValueError(f"Scheduler: params[{name!r}] must hold numbers in {low}..{high}, got {v}")
    return values


def _distree(out, nodes, exits):
    delta = out["delta"]
    if isinstance(delta, (int, float)) and not isinstance(delta, bool) or isinstance(delta, list) and len(delta) == 1:
        delta = [delta[0] if isinstance(delta, list) else delta] * exits  # one for all exits
    out["delta"] = _numbers("delta", delta, exits, float, 0.0, math.inf)


def _mdi_exit(out, nodes, exits):
    for low, high in (("t_q1", "t_q2"), ("t_min", "t_max"), ("mu_min", "mu_max"), ("mu_min", "mu"), ("mu", "mu_max")):
        if out[low] > out[high] or (low == "t_q1" and out[low] == out[high]):
            raise ValueError(f"Scheduler: params must have {low} {'<' if low == 't_q1' else '<='} {high}, got {out[low]} and {out[high]}")
    if not 0 < out["b"] < out["a"] < 1:
        raise ValueError(f"Scheduler: params must have 0 < b < a < 1, got a = {out['a']} and b = {out['b']}")


def _dimee(out, nodes, exits):
    if exits < 2:
        raise ValueError(f"Scheduler: policy 'dimee' needs a network with at least 2 exits, got {exits}")
    out["tiers"] = _numbers("tiers", out["tiers"] or (0, min(1, nodes - 1), nodes - 1), 3, operator.index, 0, nodes - 1)
    out["cuts"] = _numbers("cuts", out["cuts"] or (0, 1), 2, operator.index, 0, exits - 1)
    if not out["cuts"][0] < out["cuts"][1]:
        raise ValueError(f"Scheduler: params['cuts'] must rise, got {out['cuts']}")


def _splitee(out, nodes, exits):
    if out["cloud"] >= nodes:
        raise ValueError(f"Scheduler: params['cloud'] must be in -1..{nodes - 1}, got {out['cloud']}")
    out["cloud"] = nodes - 1 if out["cloud"] < 0 else out["cloud"]


def _daisy(out, nodes, exits):
    if not len(out["counts"]):
        if not out["mode"]:
            warnings.warn("Scheduler: policy 'daisy' without params['counts'] (training exits) runs at full depth", stacklevel=5)
        out["counts"] = [0] * (exits + 1)
    out["counts"] = _numbers("counts", out["counts"], exits + 1, operator.index, 0, _BIG)
    out["train"], out["whole_batch"] = bool(out.pop("mode")), bool(out.pop("batch_mode"))


_FINISH = {"distree": _distree, "mdi_exit": _mdi_exit, "dimee": _dimee, "splitee": _splitee, "daisy": _daisy}
