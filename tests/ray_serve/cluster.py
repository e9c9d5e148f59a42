"""A Ray cluster of several raylets on this machine, an application on it, and clients that load it."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from ulysses_infer.job.processes import free_port

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 600.0
EXPORT_SECONDS = 10.0  # between Ray's exports of metrics
APPLICATION = "ulysses-infer"
RECIPE = {
    "model.path": str(ROOT / "models/demo"),
    "model.max_model_len": 1024,
    "cache.num_blocks": 256,
    "cache.block_size": 16,
    "scheduler.max_num_seqs": 16,
    "scheduler.max_num_batched_tokens": 256,
    "runtime.device": "cpu",
    "runtime.threads_per_rank": 1,
    "policy.threshold_tokens": 8,
    "server.shutdown_timeout": 60,
    "server.heartbeat_timeout": 60,
    "ray.cpus_per_rank": 1,
}
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "DS_ACCELERATOR": "cpu",
    # fewer processes, which Ray would run at a lower priority
    "RAY_enable_worker_prestart": "0",
    "RAY_worker_niceness": "0",
    "RAY_memory_monitor_refresh_ms": "0",  # else Ray ends workers when other programs take the memory
    # a busy machine is slow to start processes; that is not what the tests are about
    "RAY_health_check_initial_delay_ms": "60000",
    "RAY_health_check_timeout_ms": "60000",
    "RAY_worker_register_timeout_seconds": "600",
    "RAY_gcs_server_request_timeout_seconds": "300",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "300",
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "60",
}


class RayCluster:
    """A head for the ingress, and nodes with CPUs for ranks."""

    def __init__(self, num_nodes, cpus_per_node):
        import ray
        from ray.cluster_utils import Cluster

        self._cpus = cpus_per_node
        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        self.nodes = []
        self.seen = set()
        """The ids of all replicas that have reported, those that have ended included."""
        for _ in range(num_nodes):
            self.add_node()
        self.address = self._cluster.address
        ray.init(address=self.address, log_to_driver=False)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def add_node(self):
        self.nodes.append(self._cluster.add_node(num_cpus=self._cpus, object_store_memory=100 << 20))

    def kill_node(self, node):
        """kill -9 of a raylet; its workers end with it."""
        self.nodes.remove(node)
        self._cluster.remove_node(node, allow_graceful=False)

    def deploy(self, **changes):
        from ray import serve
        from ray.serve.config import HTTPOptions

        from ulysses_infer.ray import build_app

        serve.start(proxy_location="HeadOnly", http_options=HTTPOptions(host="127.0.0.1", port=self.port))
        serve.run(build_app({**RECIPE, **changes}), name=APPLICATION)

    def delete(self):
        from ray import serve

        serve.delete(APPLICATION)

    def applications(self):
        from ray import serve

        return list(serve.status().applications)

    def reports(self):
        """`ReplicaReport` of every running replica, by its id."""
        from ray import serve
        from ray.serve.exceptions import DeploymentUnavailableError

        handle = serve.get_deployment_handle("UlyssesReplica", APPLICATION)
        try:
            answers = handle.broadcast("report").results(timeout_s=60, return_exceptions=True)
        except DeploymentUnavailableError:
            return {}
        reports = {each.replica: each for each in answers if not isinstance(each, BaseException)}
        self.seen |= reports.keys()
        return reports

    def scrape(self):
        """The values of the ingress's `/metrics` by name and replica, those of other labels summed."""
        return scraped([f"{self.url}/metrics"])

    def scrape_nodes(self):
        """The same of what Ray exports on all nodes, once it has exported what the replicas count now."""
        import ray

        time.sleep(2 * EXPORT_SECONDS)
        nodes = (node for node in ray.nodes() if node["Alive"])
        return scraped([f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in nodes])

    def nodes_of_ranks(self):
        """The ids of the nodes on which the replicas of the application have their ranks."""
        import ray

        groups = ray.util.placement_group_table().values()
        created = (group for group in groups if group["state"] == "CREATED")
        return {node for group in created for node in group["bundles_to_node_id"].values()}

    def wait_for(self, count, before=()):
        """Wait until this many replicas run, and not the same as `before`; returns their reports."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            reports = self.reports()
            if len(reports) == count and reports.keys() != set(before):
                return reports
            time.sleep(1)
        raise TimeoutError(f"{sorted(reports)} run")

    def close(self):
        import ray
        from ray import serve

        with contextlib.suppress(Exception):
            serve.shutdown()
        ray.shutdown()
        self._cluster.shutdown()


def scraped(urls):
    """Prometheus' samples by name and replica, those of other labels summed."""
    found = {}
    for url in urls:
        text = httpx.get(url, timeout=60).raise_for_status().text
        for sample in (each for family in text_string_to_metric_families(text) for each in family.samples):
            values = found.setdefault(sample.name, Counter())
            values[sample.labels.get("replica", "")] += sample.value
    return found


def processes(title):
    """The processes of this machine whose title has `title`, as Ray names its workers."""
    everything = psutil.process_iter(["cmdline"])
    found = (process for process in everything if title in " ".join(process.info["cmdline"] or []))
    return sorted(found, key=lambda process: process.pid)


def serve_on_ray(environment, **settings):
    """The command `serve --ray`, as a process."""
    arguments = [f"{key}={value}" for key, value in {**RECIPE, **settings}.items()]
    return subprocess.Popen(
        [sys.executable, "-m", "ulysses_infer.cli.main", "serve", "--ray", *arguments],
        env={**os.environ, **ENVIRONMENT, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def lines_until(stream, text):
    """The lines up to one with `text`, which must come."""
    for line in stream:
        yield line
        if text in line:
            return
    raise AssertionError(f"the output ended without {text!r}")


class Load:
    """Clients that send one request after the other while the block runs."""

    def __init__(self, url, num_clients, max_tokens=24):
        self._url, self._max_tokens = url, max_tokens
        self._stop = threading.Event()
        self.answers = []  # (status, body)
        self._threads = [threading.Thread(target=self._run, args=(index,)) for index in range(num_clients)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error):
        self._stop.set()
        for thread in self._threads:
            thread.join(START_SECONDS)

    def _run(self, index):
        with httpx.Client(timeout=START_SECONDS) as client:
            for turn in range(10_000):
                if self._stop.is_set():
                    return
                body = {"prompt": f"# {index}.{turn}\ndef ", "max_tokens": self._max_tokens, "ignore_eos": True}
                answer = client.post(f"{self._url}/v1/completions", json=body)
                self.answers.append((answer.status_code, answer.json()))

    def wait_for(self, count):
        """Wait for this many answers more."""
        deadline, wanted = time.monotonic() + START_SECONDS, len(self.answers) + count
        while len(self.answers) < wanted:
            assert time.monotonic() < deadline
            time.sleep(0.1)

    @property
    def statuses(self):
        return Counter(status for status, _ in self.answers)

    @property
    def failures(self):
        return [body["error"] for status, body in self.answers if status != 200]

    @property
    def lengths(self):
        """Output tokens of the requests that were answered."""
        return {body["usage"]["completion_tokens"] for status, body in self.answers if status == 200}
