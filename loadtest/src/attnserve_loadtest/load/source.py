"""Requests that are due at times of their own, sent by a process beside Locust's."""

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict

from attnserve_client import Timings

from attnserve_loadtest.options import UserOptions
from attnserve_loadtest.samples import Failure, Sample

_log = logging.getLogger(__name__)
_LATE_SECONDS = 0.05


class Source:
    """One such process; Locust has patched `subprocess`, so that reading gives way to others.

    Args:
        wanted: what to send.
        number: another for each source, of which arrivals are drawn.
    """

    def __init__(self, wanted: UserOptions, number: int) -> None:
        asked = {
            "target": wanted.target,
            "model": wanted.model,
            "variant": wanted.variant,
            "seq_lens": wanted.seq_lens,
            "batch": wanted.batch,
            "timeout": wanted.timeout,
            "seed": wanted.seed,
            "rate": wanted.rate,
            "kind": wanted.arrivals.kind,
            "size": wanted.arrivals.size,
            "number": number,
            "access": asdict(wanted.access),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "attnserve_loadtest.load.beside"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        self._said_late = False

    def samples(self) -> Iterator[Sample]:
        """What has ended, as it ends, until the process does."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            told = json.loads(line)
            if told["late"] > _LATE_SECONDS and not self._said_late:
                self._said_late = True
                _log.warning(
                    "a request was sent %.0f ms after it was due: it is this client that is slow; "
                    "give it a machine of its own or more workers",
                    told["late"] * 1e3,
                )
            yield _sample(told["sample"])

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def _sample(told: dict[str, object]) -> Sample:
    timings, failure = told.pop("timings"), told.pop("failure")
    return Sample(
        **told,  # type: ignore[arg-type]
        timings=Timings(**timings) if isinstance(timings, dict) else None,
        failure=Failure(**failure) if isinstance(failure, dict) else None,
    )
