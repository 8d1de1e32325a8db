"""Calls through the SDK, to one server or to several: each to the less busy of two drawn ones."""

import asyncio
import hashlib
import random
import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import grpc
import numpy as np
from attnserve_client import AsyncAttentionClient, Model, ResourceExhaustedError, Timings
from attnserve_proto.commands import PLAIN, Access
from numpy.typing import NDArray

from attnserve_loadtest.load.plan import Caller, Heard
from attnserve_loadtest.load.requests import Generation, Request, Single
from attnserve_loadtest.payloads import DTYPES, Payload, make_payload

# Tokens of a prompt that are sent in one step.
_CHUNK = 512
_KEPT_PAYLOADS = 64


@dataclass(frozen=True)
class Servers:
    """One or several servers of the same models, called through the SDK.

    Attributes:
        addresses: `host:port` of each.
        model: as they describe it: what `Single` requests call.
        session_model: what sessions call; None: there are no sessions.
        variant: of `Single` requests; empty lets the server pick.
        num_layers: of the sessions.
        page_tokens: tokens of a page of the servers' KV cache, as they say it.
        timeout: seconds that a request, or a layer of a session, may take.
        seed: of the random inputs.
        access: how they are reached.
    """

    addresses: tuple[str, ...]
    model: Model | None
    session_model: Model | None = None
    variant: str = ""
    num_layers: int = 1
    page_tokens: int = 16
    timeout: float = 30.0
    seed: int = 0
    access: Access = PLAIN

    def connect(self) -> Caller:
        """A caller with a connection to each server."""
        return _SdkCaller(self)


class _SdkCaller:
    def __init__(self, servers: Servers) -> None:
        self._servers = servers
        access = servers.access.of_client()
        self._clients = [AsyncAttentionClient(each, **access) for each in servers.addresses]
        self._outstanding = [0] * len(self._clients)
        self._random = random.Random(servers.seed)
        self._payload = lru_cache(_KEPT_PAYLOADS)(self._make_payload)
        self._tensors = _session_tensors(servers.session_model, servers.seed)

    async def call(self, request: Request, heard: Heard) -> None:
        """Send it to one of the servers."""
        target = heard.target = self._pick()
        self._outstanding[target] += 1
        try:
            if isinstance(request, Single):
                await self._single(self._clients[target], request, heard)
            else:
                await self._generate(self._clients[target], request, heard)
        finally:
            self._outstanding[target] -= 1

    def is_refusal(self, error: BaseException) -> bool:
        """RESOURCE_EXHAUSTED, from the SDK or from grpc."""
        return isinstance(error, ResourceExhaustedError) or (
            isinstance(error, grpc.RpcError)
            and getattr(error, "code", lambda: None)() == grpc.StatusCode.RESOURCE_EXHAUSTED
        )

    async def close(self) -> None:
        """Close all connections."""
        await asyncio.gather(*(client.close() for client in self._clients))

    def _pick(self) -> int:
        """Of two servers drawn, the one with fewer requests under way (Mitzenmacher, 2001)."""
        if len(self._clients) == 1:
            return 0
        first, second = self._random.sample(range(len(self._clients)), 2)
        return first if self._outstanding[first] <= self._outstanding[second] else second

    async def _single(self, client: AsyncAttentionClient, request: Single, heard: Heard) -> None:
        payload = self._payload(request.seq_len)
        servers = self._servers
        result = await payload.ask(client, variant=servers.variant, timeout=servers.timeout)
        heard.compute = result.timings.compute / 1e6
        heard.queue = result.timings.queue / 1e6

    def _make_payload(self, seq_len: int) -> Payload:
        assert self._servers.model is not None
        return make_payload(self._servers.model, seq_len, seed=self._servers.seed)

    async def _generate(
        self, client: AsyncAttentionClient, request: Generation, heard: Heard
    ) -> None:
        servers, model = self._servers, self._servers.session_model
        assert model is not None
        pages = servers.page_tokens
        hashes = page_hashes(request, pages)
        async with await client.session(
            model.name,
            num_layers=servers.num_layers,
            max_tokens=request.prompt + request.tokens,
            # A session that found its whole prompt would have nothing to begin with.
            prefix_hashes=hashes[: (request.prompt - 1) // pages],
            timeout=servers.timeout,
        ) as session:
            heard.compute = heard.queue = 0.0
            while session.length < request.prompt:
                count = min(_CHUNK, request.prompt - session.length)
                first, full = session.length // pages, (session.length + count) // pages
                # Of all pages that this step fills, or of none.
                new = hashes[first:full] if len(hashes) >= full else []
                for timings in await self._step(session, count, new):
                    heard.compute += timings.compute / 1e6
                    heard.queue += timings.queue / 1e6
            before = heard.first = time.monotonic()
            for token in range(request.tokens):
                if request.think and token == (request.tokens + 1) // 2:
                    await asyncio.sleep(request.think)
                    before = time.monotonic()
                timings_of_layers = await self._step(session, 1, [])
                now = time.monotonic()
                compute = sum(each.compute for each in timings_of_layers) / 1e6
                heard.tokens.append((now, now - before, session.length, compute))
                before = now

    async def _step(self, session: Any, count: int, hashes: list[bytes]) -> list[Timings]:
        timings = []
        for layer in range(session.num_layers):
            arrays = (tensor[:count] for tensor in self._tensors)
            result = await session.attend(
                layer,
                *arrays,
                prefix_hashes=hashes if layer == 0 else (),
                timeout=self._servers.timeout,
            )
            timings.append(result.timings)
        return timings


def page_hashes(request: Generation, page_tokens: int) -> list[bytes]:
    """What stands for each full page of a prompt whose blocks are known; none of another prompt.

    Args:
        request: of a trace.
        page_tokens: of the server.

    Returns:
        A hash of 32 bytes for each page that lies within known blocks, from the first on.
    """
    if not request.blocks:
        return []
    size = request.block_tokens
    known = min(request.prompt, size * len(request.blocks))
    hashes = []
    for start in range(0, known - page_tokens + 1, page_tokens):
        first, last = start // size, (start + page_tokens - 1) // size
        said = f"{request.blocks[first : last + 1]} {start - first * size}"
        hashes.append(hashlib.sha256(said.encode()).digest())
    return hashes


def _session_tensors(model: Model | None, seed: int) -> list[NDArray[Any]]:
    """Query, key and value [chunk, H, D] that all steps send the first rows of."""
    if model is None:
        return []
    generator = np.random.default_rng(seed)
    return [
        generator.standard_normal((_CHUNK, heads, dim), np.float32).astype(DTYPES[model.dtype])
        for heads, dim in (
            (model.num_heads, model.head_dim),
            (model.num_kv_heads, model.head_dim),
            (model.num_kv_heads, model.value_head_dim),
        )
    ]
