"""The manifest for KubeRay: its command is one of ours, its parts fit, Kubernetes takes them."""

import json
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from attnserve_cluster import cli, up_command
from attnserve_cluster.plan import Ports
from attnserve_server import configuration
from attnserve_server.settings import Settings

ROOT = Path(__file__).parents[3]
OBJECTS: list[dict[str, Any]] = list(
    yaml.safe_load_all((ROOT / "deploy/ray/raycluster.yaml").read_text())
)
KIND = {each["kind"]: each for each in OBJECTS}
CLUSTER: dict[str, Any] = KIND["RayCluster"]["spec"]
[GROUP] = CLUSTER["workerGroupSpecs"]
HEAD, WORKER = (each["template"]["spec"] for each in (CLUSTER["headGroupSpec"], GROUP))
[CONTAINER] = WORKER["containers"]
VERSIONS = ("1.28", "1.34")
KUBERNETES_VALIDATE = "kubernetes-validate==1.37.0"


def test_the_job_has_as_many_servers_as_there_may_be_nodes_and_one_fits_each() -> None:
    program, *words = shlex.split(KIND["RayJob"]["spec"]["entrypoint"])
    assert program == "attnserve-cluster"
    at = words.index("--")
    parsed = cli._parser().parse_args(words[:at])
    parsed.server = words[at + 1 :]
    plan = up_command.plan_of(parsed)
    assert (plan.bounds.least, plan.bounds.most) == (GROUP["minReplicas"], GROUP["maxReplicas"])
    assert plan.server.placement.cpus == int(CONTAINER["resources"]["limits"]["cpu"])
    ports = {each["name"]: each["containerPort"] for each in CONTAINER["ports"]}
    assert plan.server.ports == Ports(ports["grpc"], ports["metrics"])
    [mount] = CONTAINER["volumeMounts"]
    assert plan.server.repository == mount["mountPath"]
    server = configuration.read(plan.server.words("10.0.0.1", 8001, 8002), {})
    assert server.insecure
    assert WORKER["terminationGracePeriodSeconds"] > Settings(Path()).drain_seconds


def test_the_parts_fit() -> None:
    name = KIND["RayCluster"]["metadata"]["name"]
    assert KIND["RayJob"]["spec"]["clusterSelector"] == {"ray.io/cluster": name}
    service = KIND["Service"]["spec"]
    assert service["selector"] == {"ray.io/cluster": name, "ray.io/group": GROUP["groupName"]}
    policy = next(each for each in OBJECTS if each["kind"] == "NetworkPolicy")
    assert policy["spec"]["podSelector"]["matchLabels"] == service["selector"]
    assert CLUSTER["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert CLUSTER["rayVersion"] == version("ray")
    for pod in (HEAD, WORKER):
        assert pod["securityContext"]["runAsNonRoot"]
        for container in pod["containers"]:
            assert container["env"] == [{"name": "RAY_USAGE_STATS_ENABLED", "value": "0"}]
            confined = container["securityContext"]
            assert not confined["allowPrivilegeEscalation"]
            assert confined["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.slow
def test_kubernetes_takes_what_is_its_own(tmp_path: Path) -> None:
    """By the schemas that its API servers publish; KubeRay's own fields are not in them."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--target", tmp_path, KUBERNETES_VALIDATE]
    subprocess.run(pip, check=True)
    objects = [each for each in OBJECTS if not each["apiVersion"].startswith("ray.io/")]
    for name, spec in (("head", HEAD), ("worker", WORKER)):
        objects.append(
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}
        )
    program = (
        "import json, sys, kubernetes_validate as k\n"
        f"for each in json.loads({json.dumps(json.dumps(objects))}):\n"
        "    for version in sys.argv[1:]:\n"
        "        assert k.validate(each, version, strict=True).startswith(version)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *VERSIONS],
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
