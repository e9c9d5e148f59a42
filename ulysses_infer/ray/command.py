"""The command `serve --ray`: deploys the recipe on a Ray cluster, and removes it after a signal."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import threading

from rich.console import Console
from rich.text import Text

from ulysses_infer.child_processes import end_children_with_this_process
from ulysses_infer.config import Config
from ulysses_infer.console.banner import print_config
from ulysses_infer.console.screen import make_console
from ulysses_infer.errors import ConfigError, UlyssesError, first_line
from ulysses_infer.ray.application import build_app
from ulysses_infer.ray.placement import place
from ulysses_infer.ray.recipe import prepared
from ulysses_infer.server.process import announce, bind, url_at

APPLICATION = "ulysses-infer"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
INGRESS_CPUS = 1.0
ADDRESS = "RAY_ADDRESS"
CLIENT = "ray://"
CONNECT_SECONDS = 5.0
NICENESS = "RAY_worker_niceness"
"""Of the ranks on a cluster that is started here. Ray's default has them yield to all other processes."""
ERROR_LINE = re.compile(r"^\s*ulysses_infer\.errors\.\w+: ")
"""How a trace ends with one of our errors."""


def run(config: Config) -> int:
    """Serve until a signal, then drain; returns the exit status. Raises `UlyssesError`.

    It joins the cluster of RAY_ADDRESS or the one that runs on this machine; if there is none, it starts one here that
    ends with it.
    """
    if config.server.port == 0:
        raise ConfigError("server.port = 0: Ray Serve listens on the same port of every node; give one")
    console = make_console(0)
    print_config(console, "serve", config)
    is_own = join_cluster(console)
    if is_own:
        check_room(prepared(config))
        bind(config.server).close()  # a port that is taken is named at once; a running Serve has its own already
    signals = Signals()
    _start_serve(config)
    try:
        _deploy(config)
        announce(console, config, url_at(config.server.host, config.server.port, config.server))
        signals.wait()
    finally:
        _remove(is_own)
    return 0


class Signals:
    """Handles signals from here on, instead of Ray, whose handlers abort the process.

    The first one ends `wait`, or raises SystemExit if the application is not up yet; a second one ends the process.
    """

    def __init__(self) -> None:
        self._came = threading.Event()
        self._is_waiting = False
        for number in SIGNALS:
            signal.signal(number, self._take)

    def wait(self) -> None:
        """Wait for the first signal."""
        self._is_waiting = True
        self._came.wait()

    def _take(self, number: int, frame: object) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        self._came.set()
        if not self._is_waiting:
            raise SystemExit(128 + number)


def join_cluster(console: Console) -> bool:
    """Connect to the cluster of RAY_ADDRESS or of `ray start` on this machine; without one, start one here that ends
    with this process. Says in one line what it did; returns whether the cluster was started. Raises `ConfigError`."""
    import ray

    address = _cluster_address()
    is_own = address is None
    if is_own:
        end_children_with_this_process()
        os.environ.setdefault(NICENESS, "0")
    where = {"address": "local"} if is_own else {}  # Ray finds the address itself, and then its token
    try:
        ray.init(log_to_driver=False, include_dashboard=False, logging_level=logging.WARNING, **where)
    except (ConnectionError, RuntimeError) as error:
        at = "on this machine cannot be started" if is_own else f"at {address} cannot be joined"
        raise ConfigError(f"a Ray cluster {at}: {first_line(error)}") from error
    console.print(Text("  cluster  " + _describe_cluster(address)))
    return is_own


def _cluster_address() -> str | None:
    """Where the cluster is that Ray would join. None: nowhere, or it has crashed. Raises `ConfigError` if RAY_ADDRESS
    names one that does not answer, for which Ray itself would wait many minutes."""
    from ray._private.services import canonicalize_bootstrap_address

    given = os.environ.get(ADDRESS, "")
    try:
        address: str | None = given if given.startswith(CLIENT) else canonicalize_bootstrap_address(None)
    except ValueError as error:
        raise ConfigError(f"{ADDRESS} = {given}: {first_line(error)}; give HOST:PORT") from error
    if address is None or _answers(address.removeprefix(CLIENT)):
        return address
    if given:
        raise ConfigError(
            f"{ADDRESS} = {given}: no Ray cluster answers there; correct it, or unset it to have one started here"
        )
    return None


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def _describe_cluster(address: str | None) -> str:
    import ray

    resources = ray.cluster_resources()
    size = " · ".join(f"{resources[name]:g} {name}s" for name in ("CPU", "GPU") if name in resources)
    if address is None:
        return f"no cluster runs here: started one on this machine, which ends with this command ({size})"
    num_nodes = sum(node["Alive"] for node in ray.nodes())  # Ray lists those that have died, too
    return f"joined the cluster at {address} ({num_nodes} nodes · {size})"


def check_room(config: Config) -> None:
    """Raise `ConfigError` if the replicas cannot all run here; a cluster with other nodes may grow instead."""
    import ray

    placement, num_replicas = place(config), config.parallel.dp
    if len(placement.bundles) > 1:
        raise ConfigError(
            f"ray.ranks_per_node = {placement.ranks_per_node} spreads a replica over {len(placement.bundles)} nodes, "
            "and this machine is one; leave it out, or start a cluster of several machines first (ray start)"
        )
    needed = {name: amount * num_replicas for name, amount in placement.bundles[0].items()}
    needed["CPU"] += INGRESS_CPUS * config.ray.ingress_replicas
    here = ray.cluster_resources()
    for name, amount in needed.items():
        if amount > here.get(name, 0):
            raise ConfigError(
                f"{num_replicas} replicas of {config.parallel.world_size} ranks and the ingress reserve {amount:g} "
                f"{name}s, and this machine has {here.get(name, 0):g}; lower ray.cpus_per_rank or parallel.dp, or "
                "start a cluster of several machines first (ray start)"
            )


def _start_serve(config: Config) -> None:
    from ray import serve
    from ray.serve.config import HTTPOptions

    server = config.server
    serve.start(
        http_options=HTTPOptions(
            host=server.host, port=server.port, ssl_certfile=server.ssl_certfile, ssl_keyfile=server.ssl_keyfile
        )
    )


def _deploy(config: Config) -> None:
    from ray import serve

    try:
        serve.run(build_app(config), name=APPLICATION)
    except RuntimeError as error:
        raise UlyssesError(f"Ray Serve could not deploy the recipe: {_cause() or first_line(error)}") from error


def _cause() -> str:
    """The error of the deployment that failed, which Serve has with its traces only; "" if it has none."""
    from ray import serve

    application = serve.status().applications.get(APPLICATION)
    messages = [] if application is None else [each.message for each in application.deployments.values()]
    lines = [line for message in messages for line in message.splitlines() if ERROR_LINE.match(line)]
    return ERROR_LINE.sub("", lines[-1]) if lines else ""


def _remove(is_own: bool) -> None:
    """Drain the replicas and end them, and the cluster if it was started for them."""
    import ray
    from ray import serve

    serve.delete(APPLICATION)
    if is_own:
        serve.shutdown()
        ray.shutdown()
