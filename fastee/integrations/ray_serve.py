"""A network with exits as a Ray Serve application: in every replica the HTTP endpoint of ``fastee serve``, behind Ray's proxy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fastee.nn import EarlyExit


def application(
    net: EarlyExit | Callable[[], EarlyExit], name: str = "net", *, deployment: Mapping[str, Any] | None = None, **options: Any
) -> Any:
    """Return an application for ``ray.serve.run`` whose replicas answer like ``fastee serve``, deadlines and errors included.

    Args:
        net: what ``fastee.attach`` made, which travels to every replica by pickle, or a function without arguments that gives it there.
        name: of the model, in the URL.
        deployment: options of ``ray.serve.deployment``, such as ``num_replicas``, ``ray_actor_options``, ``autoscaling_config``.
        options: those of ``fastee.integrations.serve.Server``.

    Every replica holds one network and its own queue, and measures the profile where it runs. A deadline counts from the arrival at
    the replica: the way through Ray's proxy is not seen there. Raises ``TypeError`` for another `net`, ``ImportError`` without
    ``ray[serve]``.
    """
    try:
        from ray import serve
    except ImportError:
        raise ImportError("fastee.integrations.ray_serve needs Ray Serve: pip install 'fastee[ray-serve]'") from None
    if not isinstance(net, EarlyExit) and not callable(net):
        raise TypeError(f"net: expected a network from fastee.attach or a function that gives one, got {type(net).__name__}")

    def app():  # Ray calls it once in each replica
        from fastee.integrations.serve import Server

        return Server(net if isinstance(net, EarlyExit) else net(), name, **options).app

    # Ray hands a replica only so many requests at once, 5 unless told, and lets the others wait where no deadline is looked at;
    # twice the queue reach the replica, which refuses at once what is too much.
    asked = {"name": name, "max_ongoing_requests": 2 * options.get("queue", 64), **(deployment or {})}
    return serve.deployment(**asked)(serve.ingress(app)()).bind()
