"""Manifests for Kubernetes and KServe: sound by Kubernetes' own schemas, and of this server."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from attnserve_server import configuration

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "deploy/kubernetes"
OBJECTS: list[dict[str, Any]] = list(yaml.safe_load_all((FOLDER / "attnserve.yaml").read_text()))
RUNTIME: dict[str, Any] = yaml.safe_load((ROOT / "deploy/kserve/servingruntime.yaml").read_text())
KIND = {each["kind"]: each for each in OBJECTS}
POD: dict[str, Any] = KIND["Deployment"]["spec"]["template"]["spec"]
CONTAINERS = (POD["containers"][0], RUNTIME["spec"]["containers"][0])
# The newest that the schemas of the package know, and an old one.
VERSIONS = ("1.28", "1.34")
KUBERNETES_VALIDATE = "kubernetes-validate==1.37.0"


@pytest.mark.parametrize("container", CONTAINERS, ids=["kubernetes", "kserve"])
def test_the_server_takes_its_arguments_and_listens_where_it_is_looked_for(
    container: dict[str, Any], tmp_path: Path
) -> None:
    arguments = [each.replace("/models", str(tmp_path)) for each in container["args"]]
    settings = configuration.read([*arguments, "--provider=cpu"], {})
    assert settings.host == "0.0.0.0"
    ports = {each["containerPort"] for each in container["ports"]}
    assert settings.port in ports
    assert container["readinessProbe"]["grpc"]["port"] == settings.port
    confined = container["securityContext"]
    assert confined["readOnlyRootFilesystem"]
    assert not confined["allowPrivilegeEscalation"]
    assert confined["capabilities"] == {"drop": ["ALL"]}
    assert (confined if "runAsNonRoot" in confined else POD["securityContext"])["runAsNonRoot"]


def test_names_and_labels_are_those_of_the_deployment() -> None:
    labels = KIND["Deployment"]["spec"]["template"]["metadata"]["labels"]
    ports = {each["name"] for each in CONTAINERS[0]["ports"]}
    for each in OBJECTS:
        spec = each.get("spec", {})
        selector = spec.get("podSelector", spec.get("selector"))
        if selector is not None:
            assert selector.get("matchLabels", selector) == labels, each["kind"]
        if each["kind"] == "Service":
            assert {port["targetPort"] for port in spec["ports"]} <= ports
    assert KIND["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"] == "attnserve"


def test_a_pod_has_time_to_drain() -> None:
    before = int(CONTAINERS[0]["lifecycle"]["preStop"]["exec"]["command"][1])
    settings = configuration.read(CONTAINERS[0]["args"], {})
    assert POD["terminationGracePeriodSeconds"] > before + settings.drain_seconds


def test_a_pod_hands_its_sessions_to_the_others() -> None:
    settings = configuration.read(CONTAINERS[0]["args"], {})
    each = next(
        service["metadata"]["name"]
        for service in OBJECTS
        if service["kind"] == "Service" and service["spec"].get("clusterIP") == "None"
    )
    assert settings.move_sessions_to == f"dns:///{each}:{settings.port}"
    labels = KIND["Deployment"]["spec"]["template"]["metadata"]["labels"]
    let_in = [
        source["podSelector"]["matchLabels"]
        for rule in KIND["NetworkPolicy"]["spec"]["ingress"]
        for source in rule["from"]
        if "podSelector" in source and {"port": "grpc"} in rule["ports"]
    ]
    assert labels in let_in


def test_the_autoscaler_asks_for_what_the_adapter_offers() -> None:
    (metric,) = KIND["HorizontalPodAutoscaler"]["spec"]["metrics"]
    adapter = yaml.safe_load((FOLDER / "prometheus-adapter.yaml").read_text())
    (rule,) = adapter["rules"]["custom"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    assert "attnserve_request_seconds_sum" in rule["metricsQuery"]


@pytest.mark.slow
def test_kubernetes_takes_them(tmp_path: Path) -> None:
    """By the schemas that its API servers publish."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--target", tmp_path, KUBERNETES_VALIDATE]
    subprocess.run(pip, check=True)
    program = (
        "import json, sys, kubernetes_validate as k\n"
        "for version in sys.argv[1:]:\n"
        "    for each in OBJECTS:\n"
        "        used = k.validate(each, version, strict=True)\n"
        "        assert used.startswith(version), used\n"
        "    broken = json.loads(json.dumps(OBJECTS[1]))\n"
        "    broken['spec']['replicaz'] = 3\n"
        "    try: k.validate(broken, version, strict=True)\n"
        "    except k.ValidationError: pass\n"
        "    else: raise SystemExit('takes anything')\n"
    )
    program = f"import json\nOBJECTS = json.loads({json.dumps(json.dumps(OBJECTS))})\n{program}"
    done = subprocess.run(
        [sys.executable, "-c", program, *VERSIONS],
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
