"""Callers of KV sessions that a test kills: `python doomed_callers.py PORT KIND LEASE`.

They say "at it" once they are in the middle of things, and go on until then. Sessions are of the
model `llama`, whose sizes are those of `decode_streams`.
"""

import io
import sys
import threading
import time
from typing import Any

import numpy as np
from attnserve_client import AttentionClient, Session, SessionLayer
from attnserve_proto import attention_pb2 as pb
from decode_streams import DIM, HEADS, KV_HEADS, VALUE_DIM
from http2 import DATA, Http2Connection, data, headers, message

_STREAM = 1
_at_it = threading.Event()


def rows(tokens: int) -> list[Any]:
    """Query, key and value."""
    shapes = ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, VALUE_DIM))
    return [np.ones((tokens, *shape), np.float32) for shape in shapes]


def decode_for_ever(client: AttentionClient, lease: float) -> None:
    """Steps of four sessions together, with trees and forks."""
    generator = np.random.default_rng()
    sessions = client.sessions(4, "llama", num_layers=3, max_tokens=4096, lease=lease)
    while True:
        lengths = generator.integers(1, 65, len(sessions)).tolist()
        trees = [[-1] * n if n < 32 else None for n in lengths]
        with client.batch(sessions) as batch:
            for layer in range(3):
                batch.attend(layer, *rows(sum(lengths)), new_tokens=lengths, parents=trees)
                _at_it.set()
        for index, session in enumerate(sessions):
            if trees[index]:
                session.commit([0])
            if generator.random() < 0.1:
                sessions[index] = session.fork(lease=lease)  # the other is left to its lease
            if session.length > 3000:
                sessions[index].truncate(10)


def send_large_layers(client: AttentionClient, lease: float) -> None:
    """Messages of some MiB, one after another."""
    layers = [SessionLayer(window=8)]
    large = rows(10_000)
    while True:
        with client.session(
            "llama", num_layers=1, max_tokens=1 << 20, layers=layers, lease=lease
        ) as session:
            for _ in range(50):
                session.attend(0, *large)
                _at_it.set()


def move_sessions(client: AttentionClient, lease: float) -> None:
    """Exports and imports of a session of some MiB."""
    session = client.session("llama", num_layers=4, max_tokens=4096, lease=lease)
    for layer in range(4):
        session.attend(layer, *rows(4000))
    while True:
        file = io.BytesIO()
        client.save(session, file)
        _at_it.set()
        file.seek(0)
        loaded: Session = client.load(file, lease=lease)
        session.close()
        session = loaded


def stop_in_a_message(port: int, lease: float) -> None:
    """Over a bare socket: half of a layer's message, and no more."""

    def asked(request_id: int, **action: Any) -> bytes:
        return pb.DecodeRequest(request_id=request_id, **action).SerializeToString()

    connection = Http2Connection(port)
    opening = pb.OpenSessions(
        model="llama",
        num_layers=1,
        lease=round(lease * 1e6),
        sessions=[pb.NewSession(max_tokens=600)] * 3,
    )
    connection.send(
        headers(_STREAM, "/attnserve.v1.AttentionService/Decode"),
        message(_STREAM, asked(1, open=opening), end=False),
    )
    answer = next(f.payload for f in connection.frames() if f.kind == DATA and f.payload)
    opened = pb.DecodeResponse.FromString(answer[5:]).opened.sessions
    steps = [pb.SessionStep(session_id=each.session_id, new_tokens=10) for each in opened]
    begin = pb.BeginStep(step_id=1, sessions=steps)
    tensors = {
        name: pb.Tensor(dtype=pb.FP32, shape=array.shape, data=array.tobytes())
        for name, array in zip(("query", "key", "value"), rows(30), strict=True)
    }
    layer = asked(3, attend_layer=pb.AttendLayer(step_id=1, **tensors))
    framed = b"\0" + len(layer).to_bytes(4, "big") + layer
    connection.send(
        message(_STREAM, asked(2, begin_step=begin), end=False),
        data(_STREAM, framed[: len(framed) // 2]),
    )
    next(f for f in connection.frames() if f.kind == DATA and f.payload)  # the step has begun
    _at_it.set()
    time.sleep(600)


def main(port: int, kind: str, lease: float) -> None:
    """Call until killed."""

    def tell() -> None:
        _at_it.wait()
        print("at it", flush=True)

    threading.Thread(target=tell, daemon=True).start()
    if kind == "message":
        stop_in_a_message(port, lease)
    with AttentionClient(f"127.0.0.1:{port}") as client:
        act = {"decode": decode_for_ever, "large": send_large_layers, "move": move_sessions}[kind]
        act(client, lease)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
