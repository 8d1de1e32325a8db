"""Exit code 0 if the server at the address given as argument says SERVING, else 1.

For a server with TLS the environment says what to trust, in PEM files:

    ATTNSERVE_HEALTH_AUTHORITIES  the authorities that signed the server's certificate, or that
                                  certificate itself; without it the connection is plain
    ATTNSERVE_HEALTH_NAME         a name that the certificate is for, where it is not the address
    ATTNSERVE_HEALTH_CERTIFICATE, ATTNSERVE_HEALTH_KEY
                                  what to show to a server with --tls-client-authorities
"""

import os
import sys
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


def main(address: str) -> int:
    """Ask the health service of the server at `address` (host:port)."""
    try:
        channel = _channel(address)
    except OSError as error:
        print(error, file=sys.stderr)
        return 1
    with channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=2
            )
        except grpc.RpcError as error:
            print(f"{error.code().name}: {error.details()}", file=sys.stderr)
            return 1
    return 0 if answer.status == health_pb2.HealthCheckResponse.SERVING else 1


def _channel(address: str) -> grpc.Channel:
    # The server beside it is asked, never the proxy that the environment names for other hosts.
    options: list[tuple[str, int | str]] = [("grpc.enable_http_proxy", 0)]
    authorities = _pem("AUTHORITIES")
    if authorities is None:
        return grpc.insecure_channel(address, options=options)
    if name := os.environ.get("ATTNSERVE_HEALTH_NAME"):
        options.append(("grpc.ssl_target_name_override", name))
    credentials = grpc.ssl_channel_credentials(authorities, _pem("KEY"), _pem("CERTIFICATE"))
    return grpc.secure_channel(address, credentials, options=options)


def _pem(name: str) -> bytes | None:
    path = os.environ.get(f"ATTNSERVE_HEALTH_{name}")
    return Path(path).read_bytes() if path else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
