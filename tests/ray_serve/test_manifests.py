"""The manifests in configs/deploy name commands, ports and recipes that exist."""

import importlib
import shlex

import yaml

from tests.ray_serve.cluster import ROOT
from ulysses_infer.cli.arguments import parse
from ulysses_infer.config import load_config

FOLDER = ROOT / "configs/deploy"


def parts(name):
    """The objects of a manifest by kind."""
    return {each["kind"]: each for each in yaml.safe_load_all((FOLDER / name).read_text())}


def test_kubernetes_runs_a_command_that_exists_with_a_recipe_that_loads(tmp_path, monkeypatch):
    manifest = parts("kubernetes.yaml")
    pod = manifest["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(manifest["ConfigMap"]["data"]["recipe.yaml"])
    folder = next(each["mountPath"] for each in container["volumeMounts"] if each["name"] == "recipe")
    program, *arguments = shlex.split(" ".join(container["command"]).replace(f"{folder}/recipe.yaml", str(recipe)))
    assert program == "ulysses-infer"
    config = parse(arguments).config()
    (port,) = container["ports"]
    assert config.server.port == port["containerPort"]
    assert config.server.host == "0.0.0.0"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == config.parallel.num_ranks
    assert pod["terminationGracePeriodSeconds"] > config.server.shutdown_timeout
    assert {container[f"{name}Probe"]["httpGet"]["port"] for name in ("startup", "readiness", "liveness")} == {"http"}
    assert {container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")} <= paths()
    service = manifest["Service"]["spec"]
    assert service["selector"].items() <= manifest["Deployment"]["spec"]["template"]["metadata"]["labels"].items()
    assert service["ports"][0]["targetPort"] == port["name"]
    assert {volume["name"] for volume in pod["volumes"]} == {each["name"] for each in container["volumeMounts"]}


def paths():
    from ulysses_infer.server.http.routes import health

    return {route.path for route in health.router.routes}


def test_rayservice_builds_an_application_that_exists_from_a_recipe_that_loads():
    spec = parts("rayservice.yaml")["RayService"]["spec"]
    serve = yaml.safe_load(spec["serveConfigV2"])
    (application,) = serve["applications"]
    module, _, builder = application["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), builder))
    config = load_config(application["args"])
    cluster = spec["rayClusterConfig"]
    (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    assert serve["http_options"]["port"] in [each["containerPort"] for each in head["ports"]]
    (group,) = cluster["workerGroupSpecs"]
    (worker,) = group["template"]["spec"]["containers"]
    limits = worker["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == config.parallel.world_size
    assert limits["cpu"] >= config.parallel.world_size * config.ray.cpus_per_rank
    assert (group["minReplicas"], group["maxReplicas"]) == (config.parallel.dp, config.ray.max_replicas)
    assert group["template"]["spec"]["terminationGracePeriodSeconds"] > config.server.shutdown_timeout
