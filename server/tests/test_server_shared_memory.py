"""System shared memory, through tritonclient."""

import mmap
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
from tritonclient.utils import InferenceServerException

PAGE = mmap.PAGESIZE
FOLDER = Path("/dev/shm")


@pytest.fixture
def key() -> Iterator[str]:
    name = f"attnserve-test-{secrets.token_hex(8)}"
    path = FOLDER / name
    path.write_bytes(bytes(range(256)) * (2 * PAGE // 256))
    yield name
    path.unlink(missing_ok=True)


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
