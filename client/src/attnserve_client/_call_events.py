"""What happens to a call of messages both ways."""

from dataclasses import dataclass

from attnserve_client._errors import AttnserveError

Metadata = tuple[tuple[str, str | bytes], ...]


@dataclass(slots=True)
class Event:
    """What has happened.

    Attributes:
        received: a message of the server.
        sent: the message that was being sent is on its way, or lost with the call.
        failure: how the call ended.
    """

    received: bytes | None = None
    sent: bool = False
    failure: AttnserveError | None = None
