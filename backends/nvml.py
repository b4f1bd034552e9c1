"""NVIDIA's management library through ctypes: the names, memory and compute capability of its GPUs without a context.

Source: NVML API reference, docs.nvidia.com/deploy/nvml-api. The library comes with the driver.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from drivetrain.errors import PlatformError

LIBRARY = "libnvidia-ml.so.1"
_NAME_BYTES = 96
_NOT_SUPPORTED = 3


@dataclass(frozen=True)
class NvidiaDevice:
    """One GPU as the driver describes it.

    uuid:         ``"GPU-..."``.
    slot:         PCI address, ``"00000000:17:00.0"``.
    memory_bytes: None for a device that shares the host's memory.
    capability:   (major, minor) of its compute capability.
    """

    name: str
    uuid: str
    slot: str
    memory_bytes: int | None
    capability: tuple[int, int]


@dataclass(frozen=True)
class NvidiaDriver:
    """The driver's version and its GPUs, in PCI order."""

    version: str
    devices: tuple[NvidiaDevice, ...]


class _Memory(ctypes.Structure):
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


class _Pci(ctypes.Structure):
    _fields_ = [
        ("bus_id_legacy", ctypes.c_char * 16),
        ("domain", ctypes.c_uint),
        ("bus", ctypes.c_uint),
        ("device", ctypes.c_uint),
        ("pci_device_id", ctypes.c_uint),
        ("pci_subsystem_id", ctypes.c_uint),
        ("bus_id", ctypes.c_char * 32),
    ]


class _Session:
    """An initialised NVML; every call is checked. Use as a context, so that it is shut down again."""

    def __init__(self, library: str) -> None:
        try:
            self._library = ctypes.CDLL(library)
        except OSError as error:
            raise PlatformError(
                f"the NVIDIA driver's library {library} can't be loaded: {error}",
                hint="Install the NVIDIA driver, or start the container with its GPU runtime.",
            ) from error

    def __enter__(self) -> _Session:
        self.call("nvmlInit_v2")
        return self

    def __exit__(self, *_: object) -> None:
        self.call("nvmlShutdown")

    def call(self, function: str, *arguments: object) -> None:
        """Call one function; raise PlatformError with NVML's own message when it fails."""
        if not self.call_if_supported(function, *arguments):
            raise PlatformError(f"{function} is not supported by this device", where="NVML", hint="Run: nvidia-smi")

    def call_if_supported(self, function: str, *arguments: object) -> bool:
        """As :meth:`call`, but False for a question that does not fit the device."""
        status = getattr(self._library, function)(*arguments)
        if status not in (0, _NOT_SUPPORTED):
            describe = self._library.nvmlErrorString
            describe.restype = ctypes.c_char_p
            message = (describe(status) or b"").decode(errors="replace")
            raise PlatformError(f"{function} failed: {message} (status {status})", where="NVML", hint="Run: nvidia-smi")
        return bool(status == 0)

    def text(self, function: str, *arguments: object) -> str:
        """Call a function whose last two arguments are a buffer and its length."""
        buffer = ctypes.create_string_buffer(_NAME_BYTES)
        self.call(function, *arguments, buffer, ctypes.c_uint(_NAME_BYTES))
        return buffer.value.decode(errors="replace")

    def device(self, index: int) -> NvidiaDevice:
        handle = ctypes.c_void_p()
        self.call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(handle))
        memory, pci, major, minor = _Memory(), _Pci(), ctypes.c_int(), ctypes.c_int()
        has_memory = self.call_if_supported("nvmlDeviceGetMemoryInfo", handle, ctypes.byref(memory))
        self.call("nvmlDeviceGetPciInfo_v3", handle, ctypes.byref(pci))
        self.call("nvmlDeviceGetCudaComputeCapability", handle, ctypes.byref(major), ctypes.byref(minor))
        return NvidiaDevice(
            name=self.text("nvmlDeviceGetName", handle),
            uuid=self.text("nvmlDeviceGetUUID", handle),
            slot=pci.bus_id.decode(errors="replace"),
            memory_bytes=int(memory.total) if has_memory else None,
            capability=(major.value, minor.value),
        )


def read_driver(library: str = LIBRARY) -> NvidiaDriver:
    """Ask the driver. Opens no CUDA context. Raises PlatformError when the library is missing or a call fails."""
    with _Session(library) as session:
        count = ctypes.c_uint()
        session.call("nvmlDeviceGetCount_v2", ctypes.byref(count))
        devices = tuple(session.device(index) for index in range(count.value))
        return NvidiaDriver(session.text("nvmlSystemGetDriverVersion"), devices)
