"""What a server's metrics say of its load, read from a real one: with TLS, with a token, or not."""

from pathlib import Path

import numpy as np
import pytest
from attnserve_client import AttentionClient
from attnserve_cluster.metrics import MetricsError, MetricsPlace, Reading, Window
from attnserve_server.metrics_http import MetricsServer
from certificates import Authority
from serving import DIM, HEADS, free_port, serving, write_causal

Q = np.ones((1, HEADS, 8, DIM), np.float32)
TOKENS = np.ones((1, HEADS, DIM), np.float32)


@pytest.mark.needs_library
def test_requests_and_sessions_are_counted(tmp_path: Path) -> None:
    models = write_causal(tmp_path / "models")
    with serving(models, metrics_port=0) as server, AttentionClient(server.address) as client:
        place = MetricsPlace(f"http://127.0.0.1:{server.metrics_port}/metrics")
        window = Window()
        before = window.add(place.read())
        assert (before.requests, before.sessions, before.share_of_kv) == (0, 0, 0)
        for _ in range(5):
            client.attend(Q, Q, Q, model="causal")
        with client.session("causal", num_layers=1, max_tokens=64) as session:
            session.attend(0, TOKENS, TOKENS, TOKENS)
            now = window.add(place.read())
    assert now.requests >= 5
    assert 0 < now.queue_seconds < 60
    assert now.sessions == 1
    assert 0 < now.share_of_kv < 1


def test_over_tls_the_servers_own_certificate_is_trusted_alone(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    party, other = authority.issue("server"), authority.issue("other")
    (tmp_path / "models").mkdir()
    options = {"tls_certificate": party.certificate, "tls_key": party.key, "metrics_port": 0}
    with serving(tmp_path / "models", **options) as server:
        # By an address that the certificate isn't for.
        url = f"https://127.0.0.1:{server.metrics_port}/metrics"
        assert MetricsPlace(url, str(party.certificate)).read().sessions == 0
        with pytest.raises(MetricsError, match="CERTIFICATE_VERIFY_FAILED"):
            MetricsPlace(url, str(other.certificate)).read()


def test_a_token_is_shown_where_one_is_asked_for(tmp_path: Path) -> None:
    """As a server with callers answers addresses that are not the machine's own."""
    (tmp_path / "models").mkdir()
    with serving(tmp_path / "models") as server:
        metrics = MetricsServer(
            server.metrics.registry, "127.0.0.1", 0, lambda _, shown: shown == "Bearer secret"
        )
        url = f"http://127.0.0.1:{metrics.port}/metrics"
        token = tmp_path / "token"
        with pytest.raises(MetricsError, match=r"401 .*--metrics-token-file"):
            MetricsPlace(url).read()
        with pytest.raises(MetricsError, match="No such file"):
            MetricsPlace(url, token_file=str(token)).read()
        token.write_text("secret\n")
        assert MetricsPlace(url, token_file=str(token)).read().sessions == 0
        metrics.stop()


def test_what_is_no_server_of_ours(tmp_path: Path) -> None:
    with pytest.raises(MetricsError, match="refused"):
        MetricsPlace(f"http://127.0.0.1:{free_port()}/metrics").read()


def test_a_window_forgets_what_is_long_past() -> None:
    window = Window(5.0)
    for second in range(20):
        now = window.add(Reading(float(second), 10.0 * second, 1.0 * second, second, 1.0, 2.0))
    assert (now.requests, now.queue_seconds, now.sessions) == (50.0, 5.0, 19)
