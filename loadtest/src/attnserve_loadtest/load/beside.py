"""A process beside a Locust worker: sends what is due when it is due, and says how it went.

It reads one line of JSON, and writes one for each request that has ended, until its standard input
closes. Nothing here is patched for gevent.
"""

import asyncio
import gc
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
from attnserve_client import AsyncAttentionClient
from attnserve_proto.commands import Access

from attnserve_loadtest.load.arrivals import Arrivals
from attnserve_loadtest.load.generator import new_loop
from attnserve_loadtest.payloads import Answer, Payload, make_payload
from attnserve_loadtest.samples import sample_of

# Arrivals are drawn for so long at a time.
_DRAWN_SECONDS = 10.0


def main() -> int:
    """Send until standard input closes."""
    asked = json.loads(sys.stdin.readline())
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(_run(asked))
    return 0


async def _run(asked: dict[str, Any]) -> None:
    access = Access(**asked["access"])
    async with AsyncAttentionClient(asked["target"], **access.of_client()) as client:
        model = await client.get_model(asked["model"])
        payloads = [
            make_payload(model, seq_len, batch=asked["batch"], seed=asked["seed"])
            for seq_len in asked["seq_lens"]
        ]
        gc.freeze()
        loop = asyncio.get_running_loop()
        closed = loop.run_in_executor(None, sys.stdin.read)
        sending = asyncio.create_task(_send(client, asked, payloads))
        await asyncio.wait((closed, sending), return_when=asyncio.FIRST_COMPLETED)
        sending.cancel()


async def _send(
    client: AsyncAttentionClient, asked: dict[str, Any], payloads: list[Payload]
) -> None:
    under_way: set[asyncio.Task[None]] = set()
    start = time.monotonic()
    random = np.random.default_rng([asked["seed"], asked["number"]])
    for due in _due_times(asked):
        await asyncio.sleep(max(0.0, start + due - time.monotonic()))
        payload = payloads[random.integers(len(payloads))]
        task = asyncio.create_task(_one(client, asked, payload, start + due))
        under_way.add(task)
        task.add_done_callback(under_way.discard)


async def _one(
    client: AsyncAttentionClient, asked: dict[str, Any], payload: Payload, due: float
) -> None:
    late = time.monotonic() - due
    answer: Answer | Exception
    try:
        answer = payload.answer(
            await payload.ask(client, variant=asked["variant"], timeout=asked["timeout"])
        )
    except Exception as error:
        answer = error
    sample = sample_of(payload, asked["variant"], answer, time.monotonic() - due)
    sys.stdout.write(json.dumps({"late": late, "sample": asdict(sample)}) + "\n")
    sys.stdout.flush()


def _due_times(asked: dict[str, Any]) -> Iterator[float]:
    """Seconds from the start, without end."""
    arrivals = Arrivals(asked["kind"], asked["size"])
    part = 0
    while True:
        seed = (asked["seed"] << 32) + (asked["number"] << 8) + part
        for due in arrivals.due_times(asked["rate"], _DRAWN_SECONDS, seed):
            yield part * _DRAWN_SECONDS + float(due)
        part += 1


if __name__ == "__main__":
    raise SystemExit(main())
