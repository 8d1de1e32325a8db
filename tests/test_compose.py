"""docker-compose.yml and the Dockerfiles as text: what they name exists and is accepted."""

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from attnserve_server import configuration
from attnserve_server.settings import Settings
from certificates import Authority

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILES = sorted((ROOT / "deploy").glob("*.Dockerfile"))
KNOWN_KEYS = {
    "build", "cap_drop", "command", "deploy", "depends_on", "entrypoint", "environment", "image",
    "networks", "ports", "profiles", "read_only", "restart", "security_opt", "stop_grace_period",
    "tmpfs", "volumes",
}  # fmt: skip


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    text = re.sub(r"\\\n\s*", " ", dockerfile.read_text())
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def options_of(*command: str) -> set[str]:
    shown = subprocess.run(
        [BIN / command[0], *command[1:], "--help"], capture_output=True, text=True, check=True
    )
    return set(re.findall(r"--[a-z][a-z-]*|(?<=\W)-[a-zA-Z]\b", shown.stdout))


def given(words: list[str]) -> set[str]:
    return {word for word in words if re.match(r"--?[a-zA-Z]", word)}


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_has_only_keys_of_the_compose_specification(name: str) -> None:
    service = SERVICES[name]
    assert set(service) <= KNOWN_KEYS
    assert ("build" in service) != ("image" in service)
    assert service["profiles"]
    for port in service.get("ports", []):
        assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port)  # not to others
    for needed in service.get("depends_on", []):
        assert needed in SERVICES


@pytest.mark.parametrize("name", [n for n, s in SERVICES.items() if "build" in s])
def test_what_is_built_exists(name: str) -> None:
    build = SERVICES[name]["build"]
    dockerfile = ROOT / build["context"] / build["dockerfile"]
    assert dockerfile.is_file()
    stages = [value.split(" AS ")[-1] for key, value in instructions(dockerfile) if key == "FROM"]
    assert build.get("target", stages[-1]) in stages


def test_what_is_mounted_exists_or_is_made_here() -> None:
    for service in SERVICES.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            here = source in ("./models", "./reports") or source in COMPOSE["volumes"]
            assert here or (ROOT / source).exists(), source


@pytest.mark.parametrize("name", SERVICES)
def test_no_process_may_do_more_than_it_needs(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]


def test_grafana_finds_its_dashboards_and_prometheus() -> None:
    folder = ROOT / "deploy/grafana"
    (source,) = yaml.safe_load((folder / "provisioning/datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    assert source["url"] == "http://prometheus:9090"
    mounted = dict(volume.split(":")[:2] for volume in SERVICES["grafana"]["volumes"])
    (provider,) = yaml.safe_load((folder / "provisioning/dashboards/attnserve.yml").read_text())[
        "providers"
    ]
    assert provider["options"]["path"] == mounted["./deploy/grafana/dashboards"]
    first = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (folder / "dashboards" / Path(first).name).is_file()
    for path in (folder / "dashboards").iterdir():
        for panel in json.loads(path.read_text())["panels"]:
            assert {target["datasource"]["uid"] for target in panel["targets"]} == {source["uid"]}
    rules = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())["rule_files"]
    there = [Path(volume.split(":")[1]).name for volume in SERVICES["prometheus"]["volumes"]]
    assert set(rules) <= set(there)


def test_traces_go_from_the_server_by_the_collector_to_jaeger_and_grafana() -> None:
    deploy = ROOT / "deploy"
    collector, jaeger = SERVICES["collector"], SERVICES["jaeger"]
    assert collector["profiles"] == jaeger["profiles"] == ["traces"]
    ((source, there),) = [volume.split(":")[:2] for volume in collector["volumes"]]
    assert collector["command"] == [f"--config={there}"]
    config = yaml.safe_load((ROOT / source).read_text())
    pipeline = config["service"]["pipelines"]["traces"]
    for kind in ("receivers", "processors", "exporters"):
        assert set(pipeline[kind]) == set(config[kind])
    listens = config["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"]
    # What the compose file's remarks tell to set is a setting, and leads there.
    said = re.search(r"ATTNSERVE_TRACE_ENDPOINT=(\S+)", (ROOT / "docker-compose.yml").read_text())
    assert said is not None
    given = configuration.of_environment({"ATTNSERVE_TRACE_ENDPOINT": said[1]})
    assert given == {"trace_endpoint": f"http://collector:{listens.rpartition(':')[2]}"}
    assert set(config["exporters"]["otlp/jaeger"]["endpoint"].split(":")) == {"jaeger", "4317"}
    known = {field.variable for field in configuration.all_fields()}
    for name in ("server-cpu", "server-gpu"):
        assert set(SERVICES[name]["environment"]) <= known
    sources = [
        each
        for path in (deploy / "grafana/provisioning/datasources").iterdir()
        for each in yaml.safe_load(path.read_text())["datasources"]
    ]
    by_type = {each["type"]: each for each in sources}
    (port,) = [published.rpartition(":")[2] for published in jaeger["ports"]]
    assert by_type["jaeger"]["url"] == f"http://jaeger:{port}"
    (leads,) = by_type["prometheus"]["jsonData"]["exemplarTraceIdDestinations"]
    assert leads == {"name": "trace_id", "datasourceUid": by_type["jaeger"]["uid"]}
    assert "--enable-feature=exemplar-storage" in SERVICES["prometheus"]["command"]
    first = json.loads((deploy / "grafana/dashboards/serving.json").read_text())
    shown = [target for panel in first["panels"] for target in panel["targets"]]
    assert any(target.get("exemplar") for target in shown)
    assert all(target["expr"].startswith("histogram_quantile") for target in shown
               if target.get("exemplar"))  # fmt: skip
    assert "./server[traces]" in (deploy / "server.Dockerfile").read_text()


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_a_dockerfile_is_sound(dockerfile: Path) -> None:
    steps = instructions(dockerfile)
    assert steps[0][0] == "FROM"
    allowed = {"FROM", "WORKDIR", "COPY", "RUN", "USER", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT"}
    assert {key for key, _ in steps} <= allowed | {"CMD", "ENV", "ARG"}
    users = [value for key, value in steps if key == "USER"]
    assert users[-1] != "root"
    for key, value in steps:
        if key == "COPY" and value.startswith("--from="):
            stage, made = value.removeprefix("--from=").split()[:2]
            assert any(v.endswith(f" AS {stage}") for k, v in steps if k == "FROM")
            assert any(made in command for k, command in steps if k == "RUN")
        elif key == "COPY":
            for source in value.split()[:-1]:
                assert (ROOT / source).exists(), source
        if key in ("ENTRYPOINT", "CMD"):
            assert isinstance(json.loads(value), list)


def test_ports_are_the_servers_own() -> None:
    defaults = Settings(Path())
    for name in ("server-cpu", "server-gpu"):
        published = {int(port.split(":")[2]) for port in SERVICES[name]["ports"]}
        assert published == {defaults.port, defaults.metrics_port}
    scrape = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    target = scrape["scrape_configs"][0]["static_configs"][0]["targets"][0]
    assert target == f"server:{defaults.metrics_port}"


def test_a_stop_leaves_time_for_the_drain() -> None:
    grace = SERVICES["server-cpu"]["stop_grace_period"]
    assert int(grace.removesuffix("s")) > Settings(Path()).drain_seconds


def test_a_server_that_crashed_is_started_again() -> None:
    for name in ("server-cpu", "server-gpu"):
        assert SERVICES[name]["restart"] == "unless-stopped"


def test_the_image_has_what_the_data_plane_is_built_from_and_runs_with() -> None:
    script = (ROOT / "scripts/system-packages").read_text().split("if [")[0]
    needed = set(re.findall(r"\[(lib[a-z0-9+-]+-dev|zlib1g-dev)\]", script))
    assert needed
    build, cpu, _ = re.split(
        r"^FROM ", (ROOT / "deploy/server.Dockerfile").read_text(), flags=re.M
    )[1:]
    assert needed <= set(build.split())
    assert {"libnghttp2-14", "libssl3", "zlib1g"} <= set(cpu.split())
    # Of one Debian, so that both have the same versions of them.
    assert build.split()[0].removeprefix("python:3.11-") == cpu.split()[0].removeprefix(
        "python:3.11-slim-"
    )


def test_every_option_is_one_that_the_commands_take() -> None:
    for dockerfile in DOCKERFILES:
        entry = next(json.loads(v) for k, v in instructions(dockerfile) if k == "ENTRYPOINT")
        for key, value in instructions(dockerfile):
            if key == "CMD":
                assert given(json.loads(value)) <= options_of(*entry)
    scaling = SERVICES["loadtest"]["command"]
    assert given(scaling) <= options_of("attnserve-loadtest", scaling[0])
    locust = SERVICES["locust"]
    assert (ROOT / locust["entrypoint"][2].removeprefix("/app/")).is_file()
    # Locust's own parser with what the users add to it; in a process of its own, for gevent.
    parse = "import sys, attnserve_loadtest.users as u, locust.argument_parser as a; "
    parse += "a.get_parser().parse_args(sys.argv[1:])"
    words = [*locust["entrypoint"][1:], *locust["command"]]
    subprocess.run([sys.executable, "-c", parse, *words], check=True)


@contextlib.contextmanager
def server(repository: Path, *options: str | Path) -> Iterator[str]:
    """The address of a server that is drained afterwards."""
    command = [BIN / "attnserve-server", "--repository", repository, "--port", "0", *options]
    running = subprocess.Popen([*command, "--metrics-port", "-1"], stdout=-1, stderr=-1, text=True)
    assert running.stdout is not None
    try:
        yield running.stdout.readline().split("listening on ")[1].split()[0]
    finally:
        running.terminate()
        assert running.wait(timeout=30) == 0


def healthy(address: str, **settings: str | Path) -> bool:
    """What the health check says; `settings` are those of ATTNSERVE_HEALTH_."""
    told = {f"ATTNSERVE_HEALTH_{name}": str(value) for name, value in settings.items()}
    check = [sys.executable, str(ROOT / "deploy/healthcheck.py"), address]
    return subprocess.run(check, env=os.environ | told, capture_output=True).returncode == 0


def test_the_health_check_tells_a_server_from_none(tmp_path: Path) -> None:
    with server(tmp_path) as address:
        assert healthy(address)
        assert not healthy(address, AUTHORITIES=tmp_path / "none.pem")
    assert not healthy(address)


def test_the_health_check_of_a_server_with_tls(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    party = authority.issue("server")
    tls = ("--tls-certificate", party.certificate, "--tls-key", party.key)
    (tmp_path / "models").mkdir()
    with server(tmp_path / "models", *tls) as address:
        assert healthy(address, AUTHORITIES=authority.certificate)
        assert healthy(address, AUTHORITIES=party.certificate)  # the certificate itself
        assert healthy(address, AUTHORITIES=party.certificate, NAME="localhost")
        assert not healthy(address, AUTHORITIES=party.certificate, NAME="elsewhere")
        assert not healthy(address)
    with server(
        tmp_path / "models", *tls, "--tls-client-authorities", authority.certificate
    ) as address:
        shown = authority.issue("check")
        trusted = {"AUTHORITIES": authority.certificate}
        assert healthy(address, **trusted, CERTIFICATE=shown.certificate, KEY=shown.key)
        assert not healthy(address, **trusted)


def test_the_compose_file_for_tls_is_about_the_same_servers() -> None:
    tls = yaml.safe_load((ROOT / "deploy/compose.tls.yml").read_text())["services"]
    check = (ROOT / "deploy/healthcheck.py").read_text()
    for name, service in tls.items():
        assert set(service) <= KNOWN_KEYS
        plain = SERVICES[name]["build"]
        steps = instructions(ROOT / plain["context"] / plain["dockerfile"])
        stage = [v.split(" AS ")[-1] for k, v in steps if k == "FROM"].index(plain["target"])
        starts = [at for at, (key, _) in enumerate(steps) if key == "FROM"] + [len(steps)]
        parts = steps[starts[stage] : starts[stage + 1]]
        command = next(json.loads(value) for key, value in parts if key == "CMD")
        # What it ran without TLS, and TLS.
        assert service["command"][: len(command)] == command
        assert given(service["command"]) <= options_of("attnserve-server")
        assert set(service["environment"]) <= set(re.findall(r"ATTNSERVE_HEALTH_\w+", check))
    assert set(tls) == {name for name in SERVICES if name.startswith("server-")}


def test_what_is_said_of_probes_is_what_the_health_check_reads() -> None:
    read = set(re.findall(r"ATTNSERVE_HEALTH_\w+", (ROOT / "deploy/healthcheck.py").read_text()))
    said = (ROOT / "docs/deployment.md").read_text()
    assert set(re.findall(r"ATTNSERVE_HEALTH_\w+", said)) == read - {"ATTNSERVE_HEALTH_"}
    for block in re.findall(r"```yaml\n(.*?)```", said, re.DOTALL):
        for key, probe in yaml.safe_load(block).items():
            if key.endswith("Probe") and "exec" in probe:
                command = probe["exec"]["command"]
                assert command[1:] == ["/app/healthcheck.py", "127.0.0.1:8001"]
