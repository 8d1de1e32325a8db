"""Facts about the server measured and the client that measured it."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

from attnserve_client import ServerInfo

from attnserve_loadtest.report.schema import Client, Server


def client_facts() -> Client:
    """This process' machine and software."""
    return Client(
        attnserve_loadtest=_version("attnserve-loadtest"),
        attnserve_client=_version("attnserve-client"),
        grpcio=_version("grpcio"),
        locust=_version("locust"),
        numpy=_version("numpy"),
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        cpu_count=len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1,
    )


def server_facts(target: str, info: ServerInfo) -> Server:
    """The server, by its own account.

    Args:
        target: where it is.
        info: what it says of itself.
    """
    return Server(target, info.version, info.onnxruntime_version, tuple(info.providers))


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "unknown"
