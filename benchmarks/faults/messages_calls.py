"""Calls of messages that are nearly right, and what may come of each: one process's share."""

import gzip
import random
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import messages_mutations as mutations
import messages_seeds as seeds
from attnserve_proto import attention_pb2 as pb
from attnserve_proto.inference import open_inference_pb2 as oip
from google.protobuf.message import DecodeError, Message
from messages_connection import Answer, Connection, ConnectionEndedError, messages_of, prefixed

KINDS = ("crash", "hang", "internal", "wrong status")

OK, INVALID_ARGUMENT, RESOURCE_EXHAUSTED, INTERNAL = 0, 3, 8, 13
_NAMES = {-1: "NONE", 0: "OK", 1: "CANCELLED", 2: "UNKNOWN", 3: "INVALID_ARGUMENT",
          4: "DEADLINE_EXCEEDED", 5: "NOT_FOUND", 6: "ALREADY_EXISTS", 7: "PERMISSION_DENIED",
          8: "RESOURCE_EXHAUSTED", 9: "FAILED_PRECONDITION", 10: "ABORTED", 11: "OUT_OF_RANGE",
          12: "UNIMPLEMENTED", 13: "INTERNAL", 14: "UNAVAILABLE", 15: "DATA_LOSS",
          16: "UNAUTHENTICATED"}  # fmt: skip
# That a message may lead to, whatever it says.
_ALLOWED = {OK, INVALID_ARGUMENT, 4, 5, RESOURCE_EXHAUSTED, 9}
_UNREADABLE = "bytes that are not the request of"
# What protobuf's library reads, and this server refuses: field 0 within an unknown group, which
# some versions of that let pass, and more fields than a message may have.
_OWN_REFUSALS = ("field of number 0", "more than ")

_AT_ONCE = 64  # calls under way
_ROUND = 20_000  # messages of a connection
_PATIENCE = 20.0  # seconds without any answer: a hang
_CALL_SECONDS = 30.0  # that one call may take while others are answered
_BASES = 24  # of each method in a round
_MOST_FAULTS = 50

Report = tuple[Counter[tuple[str, str, str]], list[dict[str, Any]]]


@dataclass(slots=True)
class Sent:
    """One call and what was sent.

    Attributes:
        sort: valid, changed, compressed, or framed: with a wrong length or flag.
        unreadable: those of its messages that protobuf cannot read, by number.
    """

    method: seeds.Method
    sort: str
    body: bytes
    messages: int
    unreadable: tuple[int, ...]
    since: float


def fault(kind: str, method: str, said: str, sent: Sent | None = None) -> dict[str, Any]:
    """Something that must not be, as it is written."""
    told: dict[str, Any] = {"kind": kind, "method": method, "said": said}
    if sent is not None:
        told |= {"path": sent.method.path, "sort": sent.sort, "body": sent.body.hex()}
    return told


def send(port: int, messages: int, seed: int, reports: Any) -> None:
    """Send so many messages; puts a report after each round, and None in the end."""
    sent = number = 0
    while sent < messages:
        count = min(_ROUND, messages - sent)
        report = _round(port, count, random.Random(seed * 1_000_003 + number))
        reports.put(report)
        sent += count
        number += 1
        if any(each["kind"] in ("crash", "hang") for each in report[1]):
            break
    reports.put(None)


def replayed(port: int, told: dict[str, Any]) -> str:
    """What comes of a call that was written down."""
    connection = Connection(port, _PATIENCE)
    connection.call(told["path"], bytes.fromhex(told["body"]), gzip=told["sort"] == "compressed")
    try:
        while connection.open:
            for _, answer in connection.answers():
                return f"{_NAMES[answer.code]}: {answer.text}"
    except ConnectionEndedError as error:
        return str(error)
    return "nothing"


def _round(port: int, count: int, chance: random.Random) -> Report:
    outcomes: Counter[tuple[str, str, str]] = Counter()
    faults: list[dict[str, Any]] = []
    calls: dict[int, Sent] = {}
    try:
        maker = _Maker(seeds.methods(seeds.keep(f"127.0.0.1:{port}")), chance)
        connection = Connection(port, _PATIENCE)
    except Exception as error:  # grpc's, sockets'
        return outcomes, [fault("crash", "", f"no valid call is answered: {error}")]
    try:
        while count > 0 or connection.open:
            while count > 0 and connection.open < _AT_ONCE:
                sent = maker.next()
                compressed = sent.sort == "compressed"
                calls[connection.call(sent.method.path, sent.body, gzip=compressed)] = sent
                count -= sent.messages
            for number, answer in connection.answers():
                sent = calls.pop(number)
                found = judged(sent, answer)
                _count(outcomes, sent, answer)
                if found and len(faults) < _MOST_FAULTS:
                    faults.append(fault(*found, sent))
            _look_for_late(calls)
    except ConnectionEndedError as error:
        kind = "hang" if "too long" in str(error) else "crash"
        said = f"one of those under way: {error}"
        faults += [fault(kind, sent.method.name, said, sent) for sent in calls.values()]
    finally:
        connection.close()
    return outcomes, faults


def _look_for_late(calls: dict[int, Sent]) -> None:
    """The oldest are first."""
    for sent in calls.values():
        if time.monotonic() - sent.since > _CALL_SECONDS:
            raise ConnectionEndedError(f"a call takes too long: {sent.method.path}")
        return


def _count(outcomes: Counter[tuple[str, str, str]], sent: Sent, answer: Answer) -> None:
    at = sent.method.path.split("/")[1], sent.method.name
    outcomes[(*at, _NAMES.get(answer.code, str(answer.code)))] += 1
    outcomes[(*at, "messages")] += sent.messages
    outcomes[(*at, "unreadable")] += len(sent.unreadable)
    if sent.method.is_stream:
        outcomes[(*at, "answers")] += sum(1 for _ in messages_of(answer.body))
        outcomes[(*at, "refusals within")] += len(_errors_within(sent.method, answer))


def judged(sent: Sent, answer: Answer) -> tuple[str, str, str] | None:
    """Kind, method and what is wrong, if anything is."""
    name, code = sent.method.name, answer.code
    said = f"{sent.sort}: {_NAMES.get(code, code)}: {answer.text}"
    if sent.sort == "framed":
        return ("wrong status", name, said) if code == -1 else None
    if code == INTERNAL or INTERNAL in _errors_within(sent.method, answer):
        return "internal", name, said
    if code == RESOURCE_EXHAUSTED:
        return None
    refused_as_unreadable = code == INVALID_ARGUMENT and _UNREADABLE in answer.text
    if sent.method.response is oip.ModelStreamInferResponse:
        # Each of its messages is answered by one, in whatever order.
        refused = [_refusal(each) for each in messages_of(answer.body)]
        most = sum(_UNREADABLE in text for text in refused)
        least = most - sum(any(words in text for words in _OWN_REFUSALS) for text in refused)
        right = code == OK and least <= len(sent.unreadable) <= most
        if not right:
            said = f"{said}: {len(sent.unreadable)} are unreadable, refused were {least}..{most}"
        return None if right else ("wrong status", name, said)
    if sent.unreadable:
        # What came before may have ended the stream.
        right = refused_as_unreadable if sent.unreadable[0] == 0 else code != OK
    elif sent.sort == "valid" and sent.method.always_ok:
        right = code == OK
    else:
        own = any(words in answer.text for words in _OWN_REFUSALS)
        right = code in _ALLOWED and (own or not refused_as_unreadable)
    return None if right else ("wrong status", name, said)


def _refusal(message: bytes) -> str:
    """What a message of ModelStreamInfer says against a request."""
    return str(oip.ModelStreamInferResponse.FromString(message).error_message)


def _errors_within(method: seeds.Method, answer: Answer) -> list[int]:
    """The codes of the requests of a stream that were refused by a message."""
    if method.response is oip.ModelStreamInferResponse:  # which has no codes
        texts = map(_refusal, messages_of(answer.body))
        return [INTERNAL if "a fault in the server" in text else -1 for text in texts if text]
    if method.response not in (pb.AttendStreamResponse, pb.DecodeResponse):
        return []
    read = method.response.FromString
    codes = [read(message).error.code for message in messages_of(answer.body)]
    return [code for code in codes if code != OK]


class _Maker:
    """Makes calls."""

    def __init__(self, methods: list[seeds.Method], chance: random.Random) -> None:
        self._methods, self._chance = methods, chance
        self._weights = [method.weight for method in methods]
        self._upcoming: list[int] = []
        self._valid = [[_bytes_of(call) for call in method.calls] for method in methods]
        self._bases = [
            [_bases_of(chance.choice(method.calls), chance) for _ in range(_BASES)]
            for method in methods
        ]

    def next(self) -> Sent:
        """The next call."""
        chance = self._chance
        if not self._upcoming:
            self._upcoming = chance.choices(range(len(self._methods)), self._weights, k=1000)
        at = self._upcoming.pop()
        method = self._methods[at]
        sort = chance.random()
        if sort < 0.08:
            return self._sent(method, "valid", chance.choice(self._valid[at]))
        base = chance.choice(self._bases[at])
        share = 1.0 if len(base) == 1 else 0.1
        if sort < 0.25:
            share = 0.0
        messages = [
            mutations.changed(data, spans, chance) if chance.random() < share else data
            for data, spans in base
        ]
        if method.is_stream:
            self._rearrange(messages)
        if "Repository" in method.name:
            messages = [each for each in messages if not _names_the_model(each)]
        if sort > 0.97:
            return self._framed(method, messages)
        return self._sent(method, "compressed" if sort > 0.94 else "changed", messages)

    def _rearrange(self, messages: list[bytes]) -> None:
        chance = self._chance
        sort = chance.random()
        if sort < 0.03:
            chance.shuffle(messages)
        elif sort < 0.06:
            messages.append(chance.choice(messages))
        elif sort < 0.09:
            del messages[chance.randrange(len(messages)) :]
        elif sort < 0.12 and len(messages) > 1:
            del messages[chance.randrange(len(messages))]

    def _sent(self, method: seeds.Method, sort: str, messages: list[bytes]) -> Sent:
        unreadable: tuple[int, ...] = ()
        if sort != "valid":
            read = method.request.FromString
            unreadable = tuple(
                at for at, message in enumerate(messages) if not _is_readable(read, message)
            )
            if unreadable and method.response is not oip.ModelStreamInferResponse:
                # It ends the stream: what comes behind it is read by nobody.
                messages, unreadable = messages[: unreadable[0] + 1], unreadable[:1]
        if sort == "compressed":
            body = b"".join(prefixed(gzip.compress(each, 1), 1) for each in messages)
        else:
            body = b"".join(map(prefixed, messages))
        return Sent(method, sort, body, max(1, len(messages)), unreadable, time.monotonic())

    def _framed(self, method: seeds.Method, messages: list[bytes]) -> Sent:
        """With a prefix that is not right, somewhere."""
        chance = self._chance
        at = chance.randrange(len(messages)) if messages else 0
        parts = list(map(prefixed, messages)) or [b""]
        wrong = bytearray(parts[at])
        sort = chance.randrange(4)
        if sort == 0 or len(wrong) < 5:
            wrong = wrong[: chance.randrange(5)]
        elif sort == 1:
            wrong[0] = chance.choice((1, 2, 3, 127, 255))
        elif sort == 2:
            size = max(0, len(wrong) - 5 + chance.choice((-9, -1, 1, 9, 1000)))
            wrong[1:5] = size.to_bytes(4, "big")
        else:
            wrong[1:5] = chance.choice((0, 1, 1 << 20, 1 << 27, (1 << 32) - 1)).to_bytes(4, "big")
        parts[at] = bytes(wrong)
        body = b"".join(parts)
        return Sent(method, "framed", body, max(1, len(messages)), (), time.monotonic())


def _bytes_of(call: tuple[Message, ...]) -> list[bytes]:
    return [message.SerializeToString() for message in call]


def _bases_of(
    call: tuple[Message, ...], chance: random.Random
) -> list[tuple[bytes, list[mutations.Span]]]:
    """A call one of whose messages has other values."""
    messages = list(call)
    at = chance.randrange(len(messages))
    messages[at] = mutations.shaken(messages[at], chance)
    return [(data, mutations.spans_of(data)) for data in _bytes_of(tuple(messages))]


def _names_the_model(message: bytes) -> bool:
    """Whether it could unload, or load anew, what all others use."""
    return b"causal" in message


def _is_readable(read: Any, message: bytes) -> bool:
    try:
        read(message)
    except DecodeError:
        return False
    return True
