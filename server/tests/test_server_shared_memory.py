"""Shared memory: the registry by itself, and through tritonclient."""

import mmap
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.utils.shared_memory as triton_shm
from attnserve_export.reference import CAUSAL, attention_reference
from attnserve_server.app import AttentionServer
from attnserve_server.errors import (
    ExhaustedError,
    ForbiddenError,
    InvalidRequestError,
    NotFoundError,
    TakenError,
)
from attnserve_server.shared_memory import SharedRegions, owner_of
from tritonclient.utils import InferenceServerException

PAGE = mmap.PAGESIZE
FOLDER = Path("/dev/shm")
HERE, THERE = "127.0.0.1", "::1"


@pytest.fixture
def regions() -> SharedRegions:
    return SharedRegions(max_regions=3, max_bytes=8 * PAGE)


@pytest.fixture
def key() -> Iterator[str]:
    name = f"attnserve-test-{secrets.token_hex(8)}"
    path = FOLDER / name
    path.write_bytes(bytes(range(256)) * (2 * PAGE // 256))
    yield name
    path.unlink(missing_ok=True)


def test_what_is_written_is_seen_by_both_sides(regions: SharedRegions, key: str) -> None:
    regions.register("a", f"/{key}", 100, PAGE, HERE)
    view = regions.view("a", 5, 20, HERE)
    assert bytes(view) == bytes(range(105, 125))
    view[:2] = b"xy"
    assert (FOLDER / key).read_bytes()[105:107] == b"xy"


@pytest.mark.parametrize(
    ("offset", "byte_size"),
    [(-1, 1), (0, 0), (0, PAGE + 1), (PAGE, 1), (1, PAGE), (0, -1), (2**63, 1), (0, 2**64)],
)
def test_a_view_stays_within_its_region(
    regions: SharedRegions, key: str, offset: int, byte_size: int
) -> None:
    regions.register("a", key, 0, PAGE, HERE)
    with pytest.raises(InvalidRequestError, match=r"region 'a'.*of its 4096 bytes"):
        regions.view("a", offset, byte_size, HERE)


@pytest.mark.parametrize(
    ("offset", "byte_size"), [(0, 2 * PAGE + 1), (2 * PAGE, 1), (1, 2 * PAGE), (2**62, 1)]
)
def test_a_region_stays_within_its_object(
    regions: SharedRegions, key: str, offset: int, byte_size: int
) -> None:
    with pytest.raises(InvalidRequestError, match=r"offset and byte_size.*8192 bytes"):
        regions.register("a", key, offset, byte_size, HERE)
    assert regions.mapped_bytes == 0


@pytest.mark.parametrize(("offset", "byte_size", "field"), [(0, 0, "byte_size"), (-1, 1, "offset")])
def test_sizes_make_sense(
    regions: SharedRegions, key: str, offset: int, byte_size: int, field: str
) -> None:
    with pytest.raises(InvalidRequestError, match=field):
        regions.register("a", key, offset, byte_size, HERE)


@pytest.mark.parametrize(
    "given", ["", "/", ".", "..", "/..", "../x", "a/b", "//a", "a\0b", "ä", "a b", "x" * 256]
)
def test_keys_are_plain_names(regions: SharedRegions, given: str) -> None:
    with pytest.raises(InvalidRequestError, match="key: given"):
        regions.register("a", given, 0, 1, HERE)


@pytest.mark.parametrize("given", ["", "n" * 257])
def test_names_have_some_characters(regions: SharedRegions, key: str, given: str) -> None:
    with pytest.raises(InvalidRequestError, match="name: given"):
        regions.register(given, key, 0, 1, HERE)


def test_only_real_objects_are_opened(regions: SharedRegions, key: str) -> None:
    with pytest.raises(NotFoundError, match="no such shared-memory object"):
        regions.register("a", f"{key}-not", 0, 1, HERE)
    for make in (
        lambda path: path.symlink_to(FOLDER / key),
        lambda path: path.mkdir(),
        lambda path: os.mkfifo(path),
    ):
        path = FOLDER / f"{key}-other"
        make(path)
        try:
            with pytest.raises(InvalidRequestError, match="key: given"):
                regions.register("a", path.name, 0, 1, HERE)
        finally:
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file to another user")
def test_objects_of_other_users_are_refused(regions: SharedRegions, key: str) -> None:
    os.chown(FOLDER / key, 12345, -1)
    with pytest.raises(ForbiddenError, match="an object of user 12345"):
        regions.register("a", key, 0, 1, HERE)


def test_owners_do_not_see_each_others_regions(regions: SharedRegions, key: str) -> None:
    regions.register("a", key, 0, 10, HERE)
    regions.register("a", key, 4, 20, THERE)
    with pytest.raises(TakenError, match="name: given 'a'"):
        regions.register("a", key, 0, 1, HERE)
    assert regions.view("a", 0, 1, THERE)[0] == 4
    assert [status.byte_size for status in regions.status("", HERE)] == [10]
    regions.unregister("a", HERE)
    with pytest.raises(NotFoundError):
        regions.view("a", 0, 1, HERE)
    with pytest.raises(NotFoundError):
        regions.unregister("a", HERE)
    with pytest.raises(NotFoundError):
        regions.status("a", HERE)
    assert regions.view("a", 0, 1, THERE)


def test_private_regions_are_known_by_their_name_alone(regions: SharedRegions, key: str) -> None:
    name = regions.register_private(key, PAGE, HERE)
    assert len(name) == 32
    assert name != regions.register_private(key, PAGE, HERE)
    assert regions.status("", HERE) == []
    with pytest.raises(NotFoundError):
        regions.status(name, HERE)
    regions.unregister_all(HERE)
    assert len(regions.view(name, 0, PAGE, HERE)) == PAGE
    regions.unregister(name, HERE)
    with pytest.raises(NotFoundError):
        regions.view(name, 0, 1, HERE)


def test_a_region_in_use_is_unmapped_when_its_last_view_is_gone(
    regions: SharedRegions, key: str
) -> None:
    regions.register("a", key, 0, PAGE, HERE)
    view = regions.view("a", 0, PAGE, HERE)
    array = np.frombuffer(view, np.uint8)[7:]
    regions.unregister("a", HERE)
    (FOLDER / key).unlink()
    del view
    assert array[0] == 7
    assert regions.mapped_bytes == PAGE
    del array
    assert regions.mapped_bytes == 0


def test_regions_and_bytes_are_limited(regions: SharedRegions, key: str) -> None:
    for number in range(3):
        regions.register(str(number), key, 0, 10, HERE)
    with pytest.raises(ExhaustedError, match="allowed: 3"):
        regions.register("3", key, 0, 10, HERE)
    regions.unregister_all(HERE)
    assert regions.mapped_bytes == 0
    small = SharedRegions(max_regions=9, max_bytes=3 * PAGE)
    small.register("a", key, 0, 2 * PAGE, HERE)
    with pytest.raises(ExhaustedError, match=f"allowed: {3 * PAGE}"):
        small.register("b", key, 0, 2 * PAGE, HERE)
    assert small.mapped_bytes == 2 * PAGE


def test_an_object_cut_short_after_it_was_registered_gives_no_view(
    regions: SharedRegions, key: str
) -> None:
    regions.register("a", key, 0, 2 * PAGE, HERE)
    os.truncate(FOLDER / key, PAGE)
    with pytest.raises(InvalidRequestError, match="truncated after it was registered"):
        regions.view("a", PAGE, 1, HERE)
    assert regions.view("a", 0, PAGE, HERE)[3] == 3


@pytest.mark.parametrize(
    ("peer", "owner"),
    [
        ("ipv4:127.0.0.1:50000", "127.0.0.1"),
        ("ipv4:127.8.9.1:50000", "127.8.9.1"),
        ("ipv6:%5B::1%5D:50000", "::1"),
        ("ipv6:[::1]:50000", "::1"),
        ("ipv6:%5B::ffff:127.0.0.1%5D:50000", "127.0.0.1"),
        ("unix:", "unix"),
        ("unix:/run/a.sock", "unix"),
    ],
)
def test_local_peers_are_owners(peer: str, owner: str) -> None:
    assert owner_of(peer) == owner


@pytest.mark.parametrize(
    "peer",
    ["ipv4:10.0.0.1:50000", "ipv6:%5Bfe80::1%5D:1", "ipv6:%5B::ffff:10.0.0.1%5D:1", "", "x", "::1"],
)
def test_other_peers_are_refused(peer: str) -> None:
    with pytest.raises(ForbiddenError, match="over loopback or a Unix socket"):
        owner_of(peer)


# Through tritonclient.


@pytest.fixture
def infer_client(address: str) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(address) as opened:
        yield opened
        opened.unregister_system_shared_memory()


@pytest.fixture
def handle() -> Iterator[triton_shm.SharedMemoryRegion]:
    made = triton_shm.create_shared_memory_region(
        "region", f"attnserve-test-{secrets.token_hex(8)}", 4 * PAGE
    )
    yield made
    triton_shm.destroy_shared_memory_region(made)


def request(
    infer_client: triton.InferenceServerClient,
    handle: triton_shm.SharedMemoryRegion,
    *,
    output_bytes: int,
    output_offset: int = 3 * PAGE,
) -> tuple[triton.InferResult, np.ndarray]:
    """An inference whose tensors all lie in the region; its result and what it should be."""
    generator = np.random.default_rng(1)
    arrays = [generator.standard_normal((1, 4, 5, 8), np.float32) for _ in range(3)]
    size = arrays[0].nbytes
    triton_shm.set_shared_memory_region(handle, arrays)
    inputs = []
    for index, name in enumerate(("query", "key", "value")):
        inputs.append(triton.InferInput(name, arrays[0].shape, "FP32"))
        inputs[-1].set_shared_memory("region", size, offset=index * size)
    lengths = triton.InferInput("key_lengths", [1], "INT64")
    lengths.set_data_from_numpy(np.array([4]))
    output = triton.InferRequestedOutput("output")
    output.set_shared_memory("region", output_bytes, offset=output_offset)
    outputs = [output, triton.InferRequestedOutput("entropy")]
    result = infer_client.infer("causal", [*inputs, lengths], outputs=outputs)
    return result, attention_reference(*arrays, key_lengths=[4], scheme=CAUSAL)[0]


def test_tensors_go_in_and_out_through_shared_memory(
    infer_client: triton.InferenceServerClient, handle: triton_shm.SharedMemoryRegion
) -> None:
    infer_client.register_system_shared_memory("region", handle._shm_key, 4 * PAGE)
    status = infer_client.get_system_shared_memory_status().regions["region"]
    assert (status.key, status.offset, status.byte_size) == (handle._shm_key, 0, 4 * PAGE)
    result, expected = request(infer_client, handle, output_bytes=PAGE)
    output = triton_shm.get_contents_as_numpy(handle, np.float32, expected.shape, 3 * PAGE)
    np.testing.assert_allclose(output, expected, atol=1e-5)
    header = result.get_output("output")
    assert header.parameters["shared_memory_region"].string_param == "region"
    assert header.parameters["shared_memory_byte_size"].int64_param == 640
    assert result.as_numpy("entropy").shape == (1, 4, 5)
    assert result.get_response().raw_output_contents[0] == b""
    del output
    infer_client.unregister_system_shared_memory("region")
    infer_client.unregister_system_shared_memory("region")
    assert not infer_client.get_system_shared_memory_status().regions
    with pytest.raises(InferenceServerException, match="region: given 'region'"):
        request(infer_client, handle, output_bytes=PAGE)


def test_an_output_must_fit_where_it_goes(
    infer_client: triton.InferenceServerClient, handle: triton_shm.SharedMemoryRegion
) -> None:
    infer_client.register_system_shared_memory("region", handle._shm_key, 4 * PAGE)
    with pytest.raises(InferenceServerException, match="given 639 bytes; allowed: at least 640"):
        request(infer_client, handle, output_bytes=639)
    with pytest.raises(InferenceServerException, match="region 'region': given offset"):
        request(infer_client, handle, output_bytes=640, output_offset=4 * PAGE - 639)


def test_a_region_of_an_object_that_is_not_there(
    infer_client: triton.InferenceServerClient, handle: triton_shm.SharedMemoryRegion
) -> None:
    with pytest.raises(InferenceServerException, match="no such shared-memory") as raised:
        infer_client.register_system_shared_memory("region", "not-there", PAGE)
    assert raised.value.status() == "StatusCode.NOT_FOUND"
    infer_client.register_system_shared_memory("region", handle._shm_key, PAGE)
    with pytest.raises(InferenceServerException, match="name: given 'region'") as raised:
        infer_client.register_system_shared_memory("region", handle._shm_key, PAGE)
    assert raised.value.status() == "StatusCode.ALREADY_EXISTS"


def test_a_caller_that_ends_without_a_word_leaves_a_region_that_still_works(
    infer_client: triton.InferenceServerClient, address: str, key: str
) -> None:
    code = (
        "import sys, tritonclient.grpc as triton\n"
        "client = triton.InferenceServerClient(sys.argv[1])\n"
        "client.register_system_shared_memory('left', sys.argv[2], 16)\n"
    )
    subprocess.run([sys.executable, "-c", code, address, key], check=True, timeout=60)
    (FOLDER / key).unlink()
    assert "left" in infer_client.get_system_shared_memory_status().regions
    infer_client.unregister_system_shared_memory("left")


def test_an_output_that_is_not_aligned_is_not_left_to_the_kernels(server: AttentionServer) -> None:
    session = server.store.get("causal", "").choose("", (), ("output",), 3).session
    query = np.ones((1, 4, 3, 8), np.float32)
    feeds = dict.fromkeys(("query", "key", "value"), query)
    feeds["key_lengths"] = np.array([3], np.int64)
    feeds["bias"] = np.zeros((1, 1, 1, 1), np.float32)
    feeds["softcap"] = np.array([-1], np.float32)
    crooked = np.frombuffer(bytearray(1 + query.nbytes), np.float32, offset=1)
    results = session.run(feeds, ["output"], {"output": crooked.reshape(query.shape)})
    np.testing.assert_array_equal(results["output"], query)
    assert not crooked.any()
