"""Which ONNX Runtime execution provider to use, and why not another."""

import ctypes
import logging
from dataclasses import dataclass
from pathlib import Path

from attnserve_server import onnxruntime_library
from attnserve_server.settings import SettingsError

CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"

_INSTALL = (
    "install an NVIDIA driver for CUDA 13, and the libraries with "
    "`pip install 'onnxruntime-gpu[cuda,cudnn]'`"
)

_log = logging.getLogger(__name__)


class ProviderError(SettingsError):
    """The provider asked for does not work here; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Providers:
    """The providers to give to ONNX Runtime, preferred first."""

    names: tuple[str, ...]

    @property
    def on_cuda(self) -> bool:
        """Whether computations run on a CUDA device."""
        return CUDA in self.names


def choose(wanted: str) -> Providers:
    """Choose providers.

    Args:
        wanted: "cuda", "cpu", or "auto": CUDA where it works, else CPU.

    Raises:
        ProviderError: "cuda" was asked for and does not work.
        ValueError: `wanted` is none of the three.
    """
    if wanted not in ("auto", "cuda", "cpu"):
        raise ValueError(f"provider: {wanted!r}; allowed: auto, cuda, cpu")
    if wanted == "cpu":
        return Providers((CPU,))
    missing = missing_for_cuda()
    if missing is None:
        return Providers((CUDA, CPU))
    if wanted == "cuda":
        raise ProviderError(f"CUDA cannot be used: {missing}. To use it, {_INSTALL}")
    _log.info("running on the CPU", extra={"reason": f"CUDA cannot be used: {missing}"})
    return Providers((CPU,))


def missing_for_cuda() -> str | None:
    """What keeps CUDA from working, or None if it works."""
    provider = onnxruntime_library.folder() / "libonnxruntime_providers_cuda.so"
    if not provider.is_file():
        version = onnxruntime_library.version()
        return f"this onnxruntime ({version}) is built without it"
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver (libcuda.so.1 is not found)"
    count = ctypes.c_int(0)
    if (
        driver.cuInit(0) != 0
        or driver.cuDeviceGetCount(ctypes.byref(count)) != 0
        or not count.value
    ):
        return "the NVIDIA driver finds no device"
    _preload()
    return _missing_library(provider)


def _preload() -> None:
    """Load CUDA's and cuDNN's libraries from NVIDIA's wheels, as far as these are installed.

    In any order: those that need others which are not loaded yet are tried again. What is missing
    in the end is said when the provider is loaded.
    """
    site_packages = onnxruntime_library.folder().parents[1]
    waiting = sorted((site_packages / "nvidia").glob("**/lib/lib*.so.*"))
    while waiting:
        failed = [path for path in waiting if not _loads(path)]
        if len(failed) == len(waiting):
            return
        waiting = failed


def _loads(path: Path) -> bool:
    try:
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


def _missing_library(provider: Path) -> str | None:
    """A library that the provider needs and cannot load."""
    shared = provider.with_name("libonnxruntime_providers_shared.so")
    try:
        ctypes.CDLL(str(shared), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(provider))
    except OSError as error:
        return f"the CUDA provider does not load ({error})"
    return None
