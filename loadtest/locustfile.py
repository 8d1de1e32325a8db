"""Load test of an attnserve server.

    locust -f loadtest/locustfile.py --host 127.0.0.1:8001
    locust -f loadtest/locustfile.py --host 127.0.0.1:8001 --headless -u 4 -t 30s \\
        --model causal --seq-lens 64,256,1024
"""

from attnserve_loadtest import users


class AttendUser(users.AttendUser):
    """Sends query, key and value: `--model`, `--seq-lens`."""


class AttendTokensUser(users.AttendTokensUser):
    """Sends token ids: `--tokens-model`, `--tokens-seq-lens`."""
