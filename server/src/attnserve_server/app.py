"""A whole server: built from its settings, started, drained."""

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import grpc
from attnserve_proto import attention_pb2
from attnserve_proto.inference import open_inference_pb2
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from attnserve_server.engine import models, providers
from attnserve_server.engine.catalog import Catalog
from attnserve_server.kept_tensors import KeptTensors
from attnserve_server.metrics import Metrics
from attnserve_server.scheduler.gate import Gate
from attnserve_server.scheduler.memory import ByteBudget
from attnserve_server.scheduler.scheduler import Rules, Scheduler
from attnserve_server.services import attention, inference
from attnserve_server.services.attention import AttentionService
from attnserve_server.services.calls import Streams
from attnserve_server.services.inference import InferenceService
from attnserve_server.services.runtime import Runtime
from attnserve_server.settings import MIB, Settings, usable_cores
from attnserve_server.shared_memory import SharedRegions

SERVICES = (attention.SERVICE, inference.SERVICE)

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
        threads = settings.intra_op_threads or usable_cores()
        load = partial(
            models.load,
            providers=self.providers,
            intra_op_threads=threads,
            spinning=settings.spinning,
        )
        self.store = models.load_all(
            settings.repository,
            self.providers,
            intra_op_threads=threads,
            spinning=settings.spinning,
        )
        limits = settings.limits
        self._scheduler = Scheduler(_rules(settings, self.providers))
        self._streams = Streams()
        budget = ByteBudget(limits.max_bytes_in_flight)
        self.metrics = Metrics(merged=settings.workers > 1)
        self.metrics.watch(self.metrics.waiting, lambda: self._scheduler.waiting)
        self.metrics.watch(self.metrics.bytes_in_flight, lambda: budget.lent)
        # A stream has one reader, and as many computations as it has answers under way.
        pool = ThreadPoolExecutor(4 * settings.grpc_threads, thread_name_prefix="stream")
        kept = KeptTensors(limits.max_kept_bytes, limits.kept_lease, limits.max_kept_lease)
        self.metrics.watch(self.metrics.kept_bytes, lambda: kept.bytes)
        self.regions = SharedRegions(limits.max_shared_regions, limits.max_shared_bytes)
        self.gate = Gate(limits.max_queue_seconds)
        self.metrics.watch(self.metrics.inside, lambda: self.gate.inside)
        self.metrics.watch(self.metrics.outside, lambda: self.gate.waiting)
        runtime = Runtime(
            self.store,
            self._scheduler,
            self.gate,
            budget,
            limits,
            self.metrics,
            pool,
            kept,
            self.regions,
        )
        self._health = health.HealthServicer()
        self._server = grpc.server(
            ThreadPoolExecutor(settings.grpc_threads, thread_name_prefix="grpc"),
            options=[
                ("grpc.max_receive_message_length", limits.max_message_bytes),
                ("grpc.max_send_message_length", -1),
                # Windows that do not grow: what callers may have sent, at most, of a request that
                # is refused unread. A message that is being read may be of any size.
                ("grpc.http2.bdp_probe", 0),
                ("grpc.http2.lookahead_bytes", MIB // 2),
                ("grpc.so_reuseport", int(settings.workers > 1)),
            ],
        )
        service = AttentionService(runtime, self._streams, self.providers.names)
        self._server.add_generic_rpc_handlers((service.handler(),))
        # A call reaches one worker: the others would go on without the change.
        changeable = settings.model_control and settings.workers == 1
        catalog = Catalog(settings.repository, self.store, load, changeable=changeable)
        open_inference = InferenceService(runtime, self._streams, catalog, settings.concurrency)
        self._server.add_generic_rpc_handlers((open_inference.handler(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server, _reflected())
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
        for service in ("", *SERVICES):
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
        self._scheduler.drain()
        stopped = self._server.stop(self._settings.drain_seconds)
        self._streams.drain()
        stopped.wait()
        _log.info("stopped")

    def wait(self) -> None:
        """Wait until the server has stopped."""
        self._server.wait_for_termination()


def _rules(settings: Settings, provider: providers.Providers) -> Rules:
    batch_bytes = settings.max_batch_bytes
    if batch_bytes is None:
        batch_bytes = (256 if provider.on_cuda else 2) * MIB
    limits = settings.limits
    return Rules(
        places=settings.concurrency,
        max_queue=limits.max_queue,
        max_queue_seconds=limits.max_queue_seconds,
        max_batch_size=settings.max_batch_size,
        max_batch_bytes=batch_bytes,
        max_working_bytes=limits.max_working_bytes,
        batch_delay=settings.batch_delay,
    )


def _reflected() -> DescriptorPool:
    """What reflection describes, the messages that are in a pool of their own included."""
    pool = DescriptorPool()
    for module in (attention_pb2, open_inference_pb2, health_pb2, reflection_pb2):
        pool.AddSerializedFile(module.DESCRIPTOR.serialized_pb)
    return pool
