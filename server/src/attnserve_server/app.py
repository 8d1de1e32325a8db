"""A whole server: the data plane, fed and asked by the control plane; built, started, drained."""

import dataclasses
import logging
import os
import ssl
import time
from functools import partial
from typing import TYPE_CHECKING

import attnserve_kernels
from attnserve_dataplane import ADMIN, DataPlane, Known, collect_logs

from attnserve_server import callers, certificates, exposure, onnxruntime_library, web_tokens
from attnserve_server.files import WatchedFiles
from attnserve_server.handlers import reflection
from attnserve_server.handlers.attention import AttentionHandlers
from attnserve_server.handlers.inference import InferenceHandlers, trace_settings
from attnserve_server.handlers.threads import HandlerThreads
from attnserve_server.metrics import Metrics
from attnserve_server.metrics_http import MetricsServer
from attnserve_server.models import providers, store
from attnserve_server.models.catalog import Catalog
from attnserve_server.models.loading import BoundedLoads
from attnserve_server.models.store import ModelStore
from attnserve_server.moving import Mover
from attnserve_server.settings import MIB, Settings, SettingsError, usable_cores
from attnserve_server.tracing.exemplars import Exemplars
from attnserve_server.watchdog import Watchdog, exit_now
from attnserve_server.web_tokens import WebTokens

if TYPE_CHECKING:
    from attnserve_server.tracing.export import TraceExport

_MOST_IO_THREADS = 4
# How long runs have to end that a drain has left.
_STOP_SECONDS = 5.0
# Of the seconds of a drain, what is left for answers once sessions have been moved.
_ANSWERING = 0.1

_log = logging.getLogger(__name__)


class TracesError(SettingsError):
    """Traces cannot be sent; the message says what is missing."""


class AttentionServer:
    """A server that is loaded; `start` makes it reachable, `drain` ends it.

    Args:
        settings: how to run it.

    Raises:
        LibraryError: ONNX Runtime is not there.
        ProviderError: the provider asked for does not work.
        ManifestError: the model repository is no folder, or no model in it loads.
        CertificateError: TLS cannot be had as the settings ask.
        CallersError: the file of callers is not as it should be.
        WebTokenError: JSON Web Tokens cannot be checked as the settings ask.
        ExposureError: others could reach it, unguarded.
        TracesError: traces are to be sent, and what sends them is not installed.
        MovingError: sessions cannot be moved as the settings ask.
    """

    def __init__(self, settings: Settings) -> None:
        exposure.check(settings)
        web_tokens.check_settings(settings)
        self._settings = settings
        self.providers = providers.choose(settings.provider)
        collect_logs()
        self.plane = _data_plane(settings, self.providers)
        self.store = ModelStore(self.plane)
        self._loads = BoundedLoads(
            partial(store.load, plane=self.plane, providers=self.providers),
            settings.max_load_seconds,
        )
        failed = store.load_all(settings.repository, self.store, self._loads)
        exemplars = Exemplars()
        self._traces = _trace_export(settings, self.plane, exemplars)
        self._mover = Mover(self.plane, settings) if settings.move_sessions_to else None
        self.metrics = Metrics(
            self.plane,
            lambda: [(model.manifest.name, model.manifest.version) for model in self.store],
            exemplars,
            lambda: {} if self._traces is None else self._traces.spans,
            self._mover,
        )
        changeable = settings.model_control
        catalog = Catalog(
            settings.repository, self.store, self._loads, failed, changeable=changeable
        )
        attention = AttentionHandlers(
            self.plane,
            self.store,
            catalog,
            settings.limits,
            self.providers,
            onnxruntime_library.version(),
        )
        inference = InferenceHandlers(
            self.plane,
            self.store,
            catalog,
            settings.limits,
            settings.concurrency,
            trace_settings(settings),
        )
        methods = attention.methods() | inference.methods() | reflection.methods()
        self._files = WatchedFiles()
        self._web_tokens: WebTokens | None = None
        if settings.jwt_keys is not None:
            self._web_tokens = WebTokens(self.plane, settings)
            methods[web_tokens.PATH] = self._web_tokens.method
        self._handlers = HandlerThreads(self.plane, methods)
        self._watchdog = Watchdog(self.plane, settings.wedged_exit_seconds)
        self.port = 0
        self.metrics_port: int | None = None
        self._metrics_server: MetricsServer | None = None
        self._metrics_tls: ssl.SSLContext | None = None
        self._guard()

    def start(self) -> None:
        """Listen, and say so through the health service.

        Raises:
            OSError: an address or port cannot be had.
        """
        settings = self._settings
        if settings.metrics_port is not None:
            host = _metrics_host(settings.host)
            self._metrics_server = self.metrics.serve(
                host, settings.metrics_port, self._may_see_metrics, self._metrics_tls
            )
            self.metrics_port = self._metrics_server.port
        self._handlers.start()
        if self._traces is not None:
            self._traces.start()
        try:
            self.plane.start()
        except RuntimeError as error:
            raise OSError(str(error)) from None
        self._files.start()
        self._watchdog.start()
        address = self.plane.addresses[0]
        self.port = 0 if address.startswith("unix") else int(address.rpartition(":")[2])
        _log.info(
            "serving",
            extra={
                "address": self.address,
                "metrics_port": self.metrics_port,
                "providers": self.providers.names,
                "pid": os.getpid(),
            },
        )

    @property
    def address(self) -> str:
        """Where it listens."""
        return _address(self._settings.host, self.port)

    def drain(self) -> None:
        """Take no new requests, move sessions, answer the requests that came, and stop."""
        seconds = self._settings.drain_seconds
        _log.info("draining", extra={"seconds_at_most": seconds})
        until = time.monotonic() + seconds
        if self._mover is not None:
            self._mover.move(until - _ANSWERING * seconds)
        answered = self.plane.drain(max(0.0, until - time.monotonic()))
        self._files.stop()
        self._handlers.stop()
        self._watchdog.stop()
        if self._traces is not None:
            self._traces.stop()
        if self._metrics_server is not None:
            self._metrics_server.stop()
        _log.info("stopped", extra={"all_answered": answered})

    def exit_if_stuck(self) -> None:
        """After a drain: end the process here if it could not end otherwise.

        A run that does not end could not be waited for, nor a load torn down under its thread.
        """
        if not self.plane.stop_running(_STOP_SECONDS):
            exit_now("a computation does not end", self.plane.wedged_runs)
        if self._loads.unfinished:
            logging.shutdown()
            os._exit(0)

    def _guard(self) -> None:
        """Let callers be known, and read certificates and callers again when they change."""
        settings = self._settings
        if settings.identified:
            self._read_callers()
        if settings.callers is not None:
            self._files.add("callers", [settings.callers], self._read_callers)
        if settings.jwt_keys is not None:
            self._files.add("keys of web tokens", [settings.jwt_keys], self._read_keys)
        certified = (
            settings.tls_certificate,
            settings.tls_key,
            settings.tls_client_authorities,
        )
        if settings.tls_certificate is not None:
            self._metrics_tls = certificates.context_of(settings)
            paths = [path for path in certified if path is not None]
            self._files.add("certificates", paths, self._read_certificates)

    def _may_see_metrics(self, address: str, authorization: str) -> bool:
        if not self._settings.identified or exposure.is_loopback(address):
            return True
        found = self.plane.look_up(authorization)
        return found is not None and bool(found[1] & ADMIN)

    def _read_callers(self) -> None:
        known = self._known()
        if self._web_tokens is None:
            self.plane.set_callers(known)
        else:
            self._web_tokens.set_callers(known)

    def _read_keys(self) -> None:
        assert self._web_tokens is not None
        self._web_tokens.reload(self._known())

    def _known(self) -> list[Known]:
        settings = self._settings
        if settings.callers is None:
            return []
        return callers.read(settings.callers, callers.bounds_of(settings.limits, identified=True))

    def _read_certificates(self) -> None:
        tls = certificates.read(self._settings)
        self.plane.replace_tls(
            tls.certificate_chain or "", tls.private_key or "", tls.client_authorities or ""
        )
        if self._metrics_tls is not None:  # connections that begin from now on
            certificates.load(self._metrics_tls, self._settings)


def _address(host: str, port: int) -> str:
    if host.startswith("unix"):
        return host
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def _metrics_host(host: str) -> str:
    """Where /metrics is served: this machine alone, where gRPC has a socket of its file system."""
    return "127.0.0.1" if host.startswith("unix") else host.removeprefix("[").removesuffix("]")


def _trace_export(
    settings: Settings, plane: DataPlane, exemplars: Exemplars
) -> "TraceExport | None":
    if settings.trace_endpoint is None:
        return None
    try:
        from attnserve_server.tracing.export import TraceExport
    except ImportError as error:
        raise TracesError(
            f"--trace-endpoint: {error}; traces need OpenTelemetry: "
            "`pip install 'attnserve-server[traces]'`"
        ) from error
    return TraceExport(plane, settings.trace_endpoint, exemplars)


def _data_plane(settings: Settings, provider: providers.Providers) -> DataPlane:
    batch_bytes = settings.max_batch_bytes
    if batch_bytes is None:
        batch_bytes = (256 if provider.on_cuda else 2) * MIB
    operators = attnserve_kernels.library_path()
    tls = certificates.read(settings)
    bounds = callers.bounds_of(settings.limits, identified=settings.identified)
    own = {f"caller_{name}": value for name, value in dataclasses.asdict(bounds).items()}
    return DataPlane(
        **settings.plane_keywords | own,
        identity_required=settings.identified,
        web_tokens=settings.jwt_keys is not None,
        certificate_roles=callers.certificate_role_bits(settings),
        tracing=settings.trace_endpoint is not None,
        addresses=[_address(settings.host, settings.port)],
        io_threads=settings.io_threads or min(usable_cores(), _MOST_IO_THREADS),
        max_batch_bytes=batch_bytes,
        tls_certificate_chain=tls.certificate_chain,
        tls_private_key=tls.private_key,
        tls_client_authorities=tls.client_authorities,
        cuda=provider.on_cuda,
        intra_op_threads=settings.intra_op_threads or usable_cores(),
        onnxruntime_library=str(onnxruntime_library.path()),
        operators_library="" if operators is None else str(operators),
    )
