"""POSIX shared memory of callers on the same host, mapped into the server.

Linux keeps what `shm_open(3)` makes as files under /dev/shm, so that is where objects are opened.

Who may use it. Callers who reach the server over loopback or a Unix socket: `owner_of` refuses all
others, and what it answers keeps the regions of one kind of caller from those of another. Which
user a local caller is, gRPC does not say; the object does: it must belong to the user that the
server runs as. Without that, a server with more rights than its caller, above all one run by root,
would read and write objects for callers who may not. No exception is made for root's objects or
for a server run by root, since either would be that very case. What remains: another local user
who can connect to the port can have the server read and write objects of the server's own user.
Where that matters, run the server as a user of its own or turn shared memory off.

What cannot be ruled out. A caller may truncate an object after the check that each `view` makes;
touching the pages then cut off ends the server with SIGBUS. (Seals such as F_SEAL_SHRINK exist for
memfd_create only.) As the object belongs to the server's own user, whoever can do this could end
the server by a signal as well.
"""

import errno
import ipaddress
import mmap
import os
import re
import secrets
import stat
import threading
import urllib.parse
import weakref
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from attnserve_server.errors import (
    ExhaustedError,
    ForbiddenError,
    InvalidRequestError,
    NotFoundError,
    TakenError,
    UnimplementedError,
)

_FOLDER = Path("/dev/shm")
_KEY = re.compile(r"/?([A-Za-z0-9_.-]{1,255})")
_MAX_NAME = 256


@dataclass(frozen=True, slots=True)
class RegionStatus:
    """What a caller registered: bytes [offset, offset + byte_size) of the object `key`."""

    name: str
    key: str
    offset: int
    byte_size: int


@dataclass(frozen=True, slots=True)
class _Region:
    status: RegionStatus
    mapping: mmap.mmap
    private: bool


class SharedRegions:
    """The registered regions, by owner and name. Safe to call from several threads.

    Args:
        max_regions: regions registered at once; 0: none, shared memory is off.
        max_bytes: of all regions that are mapped, those still in use after they were unregistered
            included.
    """

    def __init__(self, max_regions: int, max_bytes: int) -> None:
        self._max_regions = max_regions
        self._max_bytes = max_bytes
        self._regions: dict[tuple[str, str], _Region] = {}
        self._mapped_bytes = 0
        # Reentrant: `_unmapped` may run wherever the last use of a mapping ends.
        self._lock = threading.RLock()

    @property
    def mapped_bytes(self) -> int:
        """Bytes of all mappings."""
        return self._mapped_bytes

    def register(self, name: str, key: str, offset: int, byte_size: int, owner: str) -> None:
        """Map part of an object under a name of the caller's choice.

        Args:
            name: 1 to 256 characters; not that of another region of this owner.
            key: as shm_open(3) takes it; the leading slash may be left out.
            offset, byte_size: the part; byte_size at least 1.
            owner: as `owner_of` answers.

        Raises:
            InvalidRequestError: a value is out of range.
            TakenError: the owner has a region of that name.
            NotFoundError: there is no such object.
            ForbiddenError: the object is not the server's user's, or may not be opened.
            ExhaustedError: over the limits.
            UnimplementedError: this host has no /dev/shm.
        """
        if not 1 <= len(name) <= _MAX_NAME:
            raise InvalidRequestError.of(
                "name", f"{len(name)} characters", f"1..{_MAX_NAME} characters"
            )
        self._add(RegionStatus(name, key, offset, byte_size), owner, private=False)

    def register_private(self, key: str, byte_size: int, owner: str) -> str:
        """Map the first bytes of an object under a name that cannot be guessed.

        Such a region is in no status, and `unregister_all` leaves it.

        Returns:
            The name: 128 random bits in hexadecimal.

        Raises:
            RequestError: as `register`.
        """
        name = secrets.token_hex(16)
        self._add(RegionStatus(name, key, 0, byte_size), owner, private=True)
        return name

    def unregister(self, name: str, owner: str) -> None:
        """Forget a region; it is unmapped once no view of it is in use any more.

        Raises:
            NotFoundError: the owner has none of that name.
        """
        with self._lock:
            if self._regions.pop((owner, name), None) is None:
                raise _unknown(name)

    def unregister_all(self, owner: str) -> None:
        """Forget all regions of an owner but the private ones."""
        with self._lock:
            for at, region in list(self._regions.items()):
                if at[0] == owner and not region.private:
                    del self._regions[at]

    def status(self, name: str, owner: str) -> list[RegionStatus]:
        """The owner's regions but the private ones; with a name, that one alone.

        Raises:
            NotFoundError: the owner has none of that name.
        """
        with self._lock:
            mine = [
                region.status
                for (whose, _), region in self._regions.items()
                if whose == owner and not region.private
            ]
        found = [status for status in mine if name in ("", status.name)]
        if name and not found:
            raise _unknown(name)
        return found

    def view(self, name: str, offset: int, byte_size: int, owner: str) -> memoryview:
        """Part of a region, writable. The mapping lasts as long as the view or any array over it.

        Do not release a view that arrays were made of; drop it.

        Args:
            name: the region.
            offset, byte_size: bytes within the region; byte_size at least 1.
            owner: as `owner_of` answers.

        Raises:
            NotFoundError: the owner has no such region.
            InvalidRequestError: it reaches beyond the region, or beyond the object as it is now.
        """
        with self._lock:
            region = self._regions.get((owner, name))
        if region is None:
            raise _unknown(name)
        within = region.status
        if offset < 0 or byte_size < 1 or offset + byte_size > within.byte_size:
            raise InvalidRequestError.of(
                f"shared_memory region {name!r}",
                f"offset {offset} and {byte_size} bytes",
                f"1 or more of its {within.byte_size} bytes",
            )
        start = within.offset + offset
        size = region.mapping.size()  # of the object, now
        if start + byte_size > size:
            raise InvalidRequestError.of(
                f"shared_memory region {name!r}",
                f"bytes up to {start + byte_size} of {within.key!r}",
                f"its first {size}: the object was truncated after it was registered",
            )
        return memoryview(region.mapping)[start : start + byte_size]

    def _add(self, status: RegionStatus, owner: str, *, private: bool) -> None:
        if status.byte_size < 1:
            raise InvalidRequestError.of("byte_size", status.byte_size, "1 or more")
        if status.offset < 0:
            raise InvalidRequestError.of("offset", status.offset, "0 or more")
        mapping, end = _open(status), status.offset + status.byte_size
        with self._lock:
            if (owner, status.name) in self._regions:
                raise TakenError(
                    f"name: given {status.name!r}, which is registered; allowed: others"
                )
            if len(self._regions) >= self._max_regions:
                raise ExhaustedError(
                    f"shared-memory regions: {len(self._regions)} are registered; "
                    f"allowed: {self._max_regions} (--max-shared-regions)"
                )
            if self._mapped_bytes + end > self._max_bytes:
                raise ExhaustedError(
                    f"shared memory: {self._mapped_bytes} bytes are mapped and {end} more were "
                    f"asked for; allowed: {self._max_bytes} (--max-shared-mib)"
                )
            self._mapped_bytes += end
            weakref.finalize(mapping, self._unmapped, end).atexit = False
            self._regions[owner, status.name] = _Region(status, mapping, private)

    def _unmapped(self, byte_size: int) -> None:
        with self._lock:
            self._mapped_bytes -= byte_size


@lru_cache(maxsize=1024)
def owner_of(peer: str) -> str:
    """What tells local callers apart: the host part of `ServicerContext.peer()`.

    Raises:
        ForbiddenError: the peer is neither on loopback nor on a Unix socket.
    """
    kind, _, rest = peer.partition(":")
    if kind in ("unix", "unix-abstract"):
        return "unix"
    host = urllib.parse.unquote(rest).rpartition(":")[0].strip("[]")
    try:
        address: ipaddress.IPv4Address | ipaddress.IPv6Address = ipaddress.ip_address(host)
    except ValueError:
        raise _not_local(peer) from None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if not address.is_loopback:
        raise _not_local(peer)
    return str(address)


def _not_local(peer: str) -> ForbiddenError:
    return ForbiddenError(
        f"shared memory: given by a caller at {peer}; "
        "allowed: callers on this host, over loopback or a Unix socket"
    )


def _unknown(name: str) -> NotFoundError:
    return NotFoundError(
        f"shared_memory region: given {name[:_MAX_NAME]!r}; allowed: a registered one"
    )


def _open(status: RegionStatus) -> mmap.mmap:
    """The object from its start to the end of the part."""
    key = _KEY.fullmatch(status.key)
    if key is None or key[1] in (".", ".."):
        raise InvalidRequestError.of(
            "key", repr(status.key[:_MAX_NAME]), f"a name of shm_open(3), {_KEY.pattern}"
        )
    if not _FOLDER.is_dir():
        raise UnimplementedError("shared memory: this server's system has no /dev/shm")
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        descriptor = os.open(_FOLDER / key[1], flags)
    except OSError as error:
        raise _not_opened(status.key, error) from None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise InvalidRequestError.of("key", repr(status.key), "a shared-memory object")
        if found.st_uid != os.geteuid():
            raise ForbiddenError(
                f"key: given {status.key!r}, an object of user {found.st_uid}; "
                f"allowed: those of user {os.geteuid()}, whom this server runs as"
            )
        end = status.offset + status.byte_size
        if end > found.st_size:
            raise InvalidRequestError.of(
                "offset and byte_size",
                f"{status.offset} and {status.byte_size}",
                f"parts of the {found.st_size} bytes of {status.key!r}",
            )
        return mmap.mmap(descriptor, end)
    except OSError as error:
        raise _not_opened(status.key, error) from None
    finally:
        os.close(descriptor)


def _not_opened(key: str, error: OSError) -> Exception:
    if error.errno == errno.ENOENT:
        return NotFoundError(f"key: given {key!r}; no such shared-memory object on this host")
    if error.errno in (errno.EACCES, errno.EPERM):
        return ForbiddenError(f"key: given {key!r}, which this server may not read and write")
    return InvalidRequestError.of(
        "key", f"{key!r} ({error.strerror})", "a shared-memory object, no link"
    )
