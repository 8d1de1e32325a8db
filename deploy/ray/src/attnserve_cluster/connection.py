"""A command's way to a Ray cluster, and to the controller of a cluster of servers there."""

import logging
import os
import re
import signal
import socket
import threading
from argparse import ArgumentTypeError
from collections.abc import Callable
from typing import Any

from attnserve_proto.commands import CommandError, Loading, Silence

from attnserve_cluster import readers
from attnserve_cluster.plan import NAMESPACE

_REACH_SECONDS, _BEGIN_SECONDS, _ANSWER_SECONDS = 5.0, 60.0, 20.0
_HERE = ("localhost", "127.0.0.1", "[::1]")
_VARIABLE = "RAY_ADDRESS"  # Ray's own


class NoClusterError(CommandError):
    """There is no such cluster of servers."""


class NoAnswerError(CommandError):
    """Its controller does not answer now."""


def connect(address: str) -> None:
    """Reach a Ray cluster.

    Args:
        address: `auto`, the one that runs on this machine or that RAY_ADDRESS names; HOST:PORT; or
            ray://HOST:PORT.

    Raises:
        CommandError: there is none.
    """
    option = "--address"
    if address == "auto" and (named := os.environ.get(_VARIABLE)):
        option, address = _VARIABLE, _read(named)
    # Before Ray is loaded. It says what its own processes do to whoever starts one.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with Loading():  # what waits in Ray's own code would not be interrupted otherwise
        import ray
        import ray.util

        if address != "auto":
            _reach(option, address, ray.util.get_node_ip_address)
        # Its warnings would stand between the lines of a command.
        logging.getLogger("ray").setLevel(logging.ERROR)
        errors: list[BaseException] = []

        def begin() -> None:
            try:
                ray.init(
                    address,
                    namespace=NAMESPACE,
                    log_to_driver=False,
                    configure_logging=False,
                    logging_level=logging.ERROR,
                )
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=begin, name="ray-init", daemon=True)
        with Silence():  # Ray's C++ says there what no logger's level keeps back
            thread.start()
            thread.join(_BEGIN_SECONDS)
    if thread.is_alive():
        raise _refusal(option, address, f"no answer within {_BEGIN_SECONDS:g} s")
    if errors:
        raise _refusal(option, address, str(errors[0]))
    if threading.current_thread() is threading.main_thread():
        # Ray's own way would be a report of where the process was.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _read(given: str) -> str:
    """The address that the variable names. Ray would start a cluster for `local`."""
    try:
        return readers.address(given)
    except ArgumentTypeError as error:
        raise CommandError(f"{_VARIABLE}: {error}", 2) from None


def _reach(option: str, address: str, address_of_machine: Callable[[], str]) -> None:
    """See whether anybody listens there: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    # Ray takes the machine's own address for these.
    reached = address_of_machine() if host in _HERE and "ray://" not in address else host
    try:
        socket.create_connection((reached.strip("[]"), int(port)), _REACH_SECONDS).close()
    except OSError as error:
        there = "" if reached == host else f" (at {reached}, where Ray looks for it)"
        raise _refusal(option, address, f"{error.strerror or error}{there}") from None


def _refusal(option: str, address: str, reason: str) -> CommandError:
    said = re.sub(r"\s+", " ", reason).strip()
    return CommandError(
        f"{option}: given {address}: {said[:500]}; allowed: a Ray cluster that runs, of this "
        "version (`ray start --head`)"
    )


def find(name: str) -> Any:
    """The controller of a cluster of servers.

    Raises:
        NoClusterError: there is none of that name.
    """
    import ray

    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        raise NoClusterError(
            f"--name: given {name}, which is not up; see `attnserve-cluster up`"
        ) from None


def answer(name: str, reference: Any, seconds: float = _ANSWER_SECONDS) -> Any:
    """What a controller answers.

    Raises:
        NoAnswerError: it does not.
    """
    import ray
    from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

    try:
        return ray.get(reference, timeout=seconds)
    except GetTimeoutError:
        raise NoAnswerError(f"{name}: its controller did not answer within {seconds:g} s") from None
    except RayTaskError as error:
        raise CommandError(f"{name}: {error.cause}") from None
    except RayActorError as error:
        reason = str(error).splitlines()[0]
        raise NoAnswerError(f"{name}: its controller does not answer: {reason}") from None
