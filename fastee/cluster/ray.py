"""``fastee up --ray``: Ray places the nodes of a cluster.toml and starts them again, nothing more. Tasks, heartbeats and liveness stay with ZeroMQ.

One plain actor per node holds one ``fastee node`` process. The checkpoint travels once through Ray's object store, so a machine needs fastee, Ray and its
own key file. Ray must run in a network that is trusted: who reaches it may run code.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastee.cluster.config import ClusterConfig, load_config, read_config
from fastee.errors import ClusterError

SETTINGS = {
    "RAY_health_check_period_ms": "500", "RAY_health_check_timeout_ms": "1000", "RAY_health_check_failure_threshold": "3", "RAY_worker_niceness": "0",
}  # fmt: skip
"""Environment for ``ray start``: with its defaults Ray takes 15 to 65 s to see a dead machine, and starts workers at nice 15, so that on a busy machine a
node gets almost no processor (3 % of one, seen)."""
_AGAIN_SECONDS = 0.5
_SHARE = 0.001
# The node must not outlive its actor: SIGTERM when the thread that started it ends, also by kill -9 of the actor.
_BOUND = "import ctypes, os, sys; p = int(sys.argv[1]); ctypes.CDLL(None).prctl(1, 15); os.getppid() == p and os.execv(sys.argv[2], sys.argv[2:])"


def pushed_files(config: ClusterConfig) -> dict[str, bytes]:
    """Return what a machine needs of the model, name -> bytes: the checkpoint and, where it lies beside the cluster.toml, the backbone's module.

    Raises ``ClusterError`` when there is no checkpoint.
    """
    checkpoint = Path(config.folder, config.model.checkpoint)
    if not checkpoint.is_file():
        raise ClusterError(f"cluster: model.checkpoint: no file {str(checkpoint)!r}, expected what net.save() wrote")
    out = {checkpoint.name: checkpoint.read_bytes()}
    module = config.model.backbone.partition(":")[0].replace(".", "/") + ".py"
    if (beside := Path(config.folder, module)).is_file():
        out[module] = beside.read_bytes()
    return out


class NodeActor:
    """What Ray runs on a machine: the files in a folder of their own and a ``fastee node`` over them, started again when it dies."""

    def __init__(self, name: str, config: str, checkpoint: str, files: dict[str, bytes], keys: str | None):
        self._name, self._keys = name, keys
        self._folder = tempfile.TemporaryDirectory(prefix=f"fastee-{name}-")
        for path, data in {**files, "cluster.toml": config.replace(checkpoint, Path(checkpoint).name).encode()}.items():
            at = Path(self._folder.name, path)
            at.parent.mkdir(parents=True, exist_ok=True)
            at.write_bytes(data)
        self._process: subprocess.Popen | None = None
        self._leaving = threading.Event()
        self.starts = 0

    def run(self) -> int:
        """Serve until :meth:`leave`, however often the node's process dies before; returns its last exit status."""
        while True:
            words = [sys.executable, "-m", "fastee", "node", "--config", str(Path(self._folder.name, "cluster.toml")), "--name", self._name]
            words += ["--keys", str(Path(self._keys, f"{self._name}.toml"))] if self._keys else []
            self._process = subprocess.Popen([sys.executable, "-c", _BOUND, str(os.getpid()), *words], stdin=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
            self.starts += 1
            status = self._process.wait()
            if self._leaving.wait(_AGAIN_SECONDS):
                return status

    def leave(self) -> None:
        """Let the node drain and end."""
        self._leaving.set()
        if self._process is not None:
            self._process.terminate()


def resource_of(ray: Any, name: str, host: str) -> dict[str, float]:
    """Return what the actor of a node asks for: Ray's resource of the node's name, else the machine with the node's address.

    Raises ``ClusterError`` when no machine of the Ray cluster offers either.
    """
    offered = ray.cluster_resources()
    for resource, amount in ((name, 1.0), (f"node:{host}", _SHARE)):
        if resource in offered:
            return {resource: amount}
    raise ClusterError(
        f"cluster: no machine of the Ray cluster has the resource {name!r} (`ray start --resources '{{\"{name}\": 1}}'`) or the address {host} of node {name!r}"
    )


class RayCluster:
    """The actors of a cluster.toml's nodes, made by :func:`up`; ``.actors`` by name. Closing it lets every node drain and leave."""

    def __init__(self, ray: Any, config: ClusterConfig, text: str, keys: str | None):
        self._ray = ray
        self._files = files = ray.put(pushed_files(config))  # kept: an actor that starts again needs them
        # By value, else every actor would import this package, and torch with it, only to start a process that does so again.
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        kind = ray.remote(NodeActor)
        self.actors: dict[str, Any] = {}
        self._runs: dict[str, Any] = {}
        for node in config.nodes:
            wanted = resource_of(ray, node.name, node.host)
            options = {"num_cpus": 0, "resources": wanted, "max_restarts": -1, "max_task_retries": -1, "max_concurrency": 2}
            self.actors[node.name] = actor = kind.options(**options).remote(node.name, text, config.model.checkpoint, files, keys)
            self._runs[node.name] = actor.run.remote()

    def ended(self, seconds: float = 0.0) -> dict[str, str]:
        """Return the nodes that will not come back -> why, waiting up to `seconds` for the first."""
        done, _ = self._ray.wait(list(self._runs.values()), timeout=seconds)
        out = {}
        for name, run in self._runs.items():
            if run in done:
                try:
                    out[name] = f"ended with status {self._ray.get(run)}"
                except self._ray.exceptions.RayError as error:
                    out[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        return out

    def close(self, drain: float = 30.0) -> None:
        """Let all nodes leave, `drain` seconds at most, then end the actors."""
        end = time.monotonic() + drain
        for actor in self.actors.values():
            actor.leave.remote()
        self._ray.wait(list(self._runs.values()), num_returns=len(self._runs), timeout=max(0.0, end - time.monotonic()))
        for actor in self.actors.values():
            self._ray.kill(actor)


def up(config: str | os.PathLike, keys: str | os.PathLike | None = None) -> RayCluster:
    """Start an actor per node of a cluster.toml on the Ray cluster that ``ray.init`` joined, and return the :class:`RayCluster`; it does not wait until they serve.

    A node goes to the machine that offers the resource of its name, else to the one with its address. `keys`: a folder on the nodes' machines that
    holds NAME.toml of `fastee keys`, needed where the file lists public keys; secrets do not pass through Ray. Raises ``ClusterError``.

    >>> ray.init(address="auto"); nodes = up("cluster.toml")     # doctest: +SKIP
    """
    try:
        import ray
    except ImportError as error:
        raise ClusterError("cluster: `fastee up --ray` needs Ray: pip install 'fastee[ray]'") from error
    read = load_config(config)
    if read.secure and keys is None:
        raise ClusterError("cluster: the nodes have public keys: pass --keys FOLDER, the folder of their key files on their machines")
    text = Path(config).read_text()
    read_config(text.replace(read.model.checkpoint, Path(read.model.checkpoint).name))
    return RayCluster(ray, read, text, None if keys is None else os.fspath(keys))


def serve(config: str | os.PathLike, keys: str | os.PathLike | None, address: str, say: Callable[[str], None]) -> int:
    """Join the Ray cluster at `address`, keep the nodes up until ctrl-C, then let them leave; returns 1 when a node was lost for good."""
    try:
        import ray
    except ImportError as error:
        raise ClusterError("cluster: `fastee up --ray` needs Ray: pip install 'fastee[ray]'") from error
    ray.init(address=address, namespace="fastee", log_to_driver=True)
    nodes, lost = up(config, keys), {}
    say(f"up: {', '.join(nodes.actors)}; `fastee top --config {os.fspath(config)}` shows them, ctrl-C lets them leave")
    try:
        while not lost:
            lost = nodes.ended(1.0)
    except KeyboardInterrupt:
        pass
    for name, why in lost.items():
        say(f"up: node {name}: {why}")
    nodes.close()
    ray.shutdown()
    return int(bool(lost))
