"""A whole server: built from its settings, started, drained."""

import logging
import os
from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from attnserve_server.engine import models, providers
from attnserve_server.metrics import Metrics
from attnserve_server.scheduler import Places
from attnserve_server.scheduler.memory import ByteBudget
from attnserve_server.services.attention import SERVICE, AttentionService
from attnserve_server.services.runtime import Runtime
from attnserve_server.services.stream import Streams
from attnserve_server.settings import Settings, usable_cores

_log = logging.getLogger(__name__)


class AttentionServer:
    """A server that is loaded; `start` makes it reachable, `drain` ends it.

    Args:
        settings: how to run it.

    Raises:
        ProviderError: the provider asked for does not work.
        ManifestError: the model repository is not as it should be.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.providers = providers.choose(settings.provider)
        self.store = models.load_all(
            settings.repository,
            self.providers,
            intra_op_threads=settings.intra_op_threads or usable_cores(),
            spinning=settings.spinning,
        )
        limits = settings.limits
        self._places = Places(settings.concurrency, limits.max_queue)
        self._streams = Streams()
        budget = ByteBudget(limits.max_bytes_in_flight)
        self.metrics = Metrics(merged=settings.workers > 1)
        self.metrics.watch(self.metrics.waiting, lambda: self._places.waiting)
        self.metrics.watch(self.metrics.bytes_in_flight, lambda: budget.lent)
        # A stream has one reader, and as many computations as it has answers under way.
        pool = ThreadPoolExecutor(4 * settings.grpc_threads, thread_name_prefix="stream")
        runtime = Runtime(self.store, self._places, budget, limits, self.metrics, pool)
        self._health = health.HealthServicer()
        self._server = grpc.server(
            ThreadPoolExecutor(settings.grpc_threads, thread_name_prefix="grpc"),
            options=[
                ("grpc.max_receive_message_length", limits.max_message_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", int(settings.workers > 1)),
            ],
        )
        service = AttentionService(runtime, self._streams, self.providers.names)
        self._server.add_generic_rpc_handlers((service.handler(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        self.port = 0
        self.metrics_port: int | None = None

    def start(self) -> None:
        """Listen, then say so through the health service.

        Raises:
            OSError: the port cannot be had.
        """
        settings = self._settings
        address = f"{settings.host}:{settings.port}"
        try:
            self.port = self._server.add_insecure_port(address)
        except RuntimeError:
            raise OSError(f"cannot listen on {address}; is it in use?") from None
        if settings.metrics_port is not None:
            self.metrics_port = self.metrics.serve(settings.host, settings.metrics_port)
        self._server.start()
        for service in ("", SERVICE):
            self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        _log.info(
            "serving",
            extra={
                "address": f"{settings.host}:{self.port}",
                "metrics_port": self.metrics_port,
                "providers": self.providers.names,
                "pid": os.getpid(),
            },
        )

    def drain(self) -> None:
        """Take no new requests, answer those that came, and stop."""
        _log.info("draining", extra={"seconds_at_most": self._settings.drain_seconds})
        self._health.enter_graceful_shutdown()
        self._places.drain()
        stopped = self._server.stop(self._settings.drain_seconds)
        self._streams.drain()
        stopped.wait()
        _log.info("stopped")

    def wait(self) -> None:
        """Wait until the server has stopped."""
        self._server.wait_for_termination()
