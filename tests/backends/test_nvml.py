"""NVIDIA's management library is called as its header says: checked against a small library with the same functions."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from drivetrain.backends.nvml import NvidiaDevice, NvidiaDriver, read_driver
from drivetrain.errors import PlatformError

# Structures and signatures as in the NVML API reference; two devices, of which the second shares the host's memory.
_SOURCE = """
#include <stdio.h>
#include <string.h>
typedef struct { char legacy[16]; unsigned domain, bus, device, id, subsystem; char bus_id[32]; } pci_t;
typedef struct { unsigned long long total, free, used; } memory_t;
static int sessions = 0;
static int handles[2] = {0, 1};
int open_sessions(void) { return sessions; }
const char *nvmlErrorString(int status) { return status == 9 ? "Driver Not Loaded" : "Unknown Error"; }
int nvmlInit_v2(void) { if (INIT_STATUS) return INIT_STATUS; sessions++; return 0; }
int nvmlShutdown(void) { sessions--; return 0; }
int nvmlSystemGetDriverVersion(char *text, unsigned length) { snprintf(text, length, "580.82.07"); return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, int **handle) { *handle = &handles[index]; return 0; }
int nvmlDeviceGetName(int *handle, char *text, unsigned length) { snprintf(text, length, "GPU %d", *handle); return 0; }
int nvmlDeviceGetUUID(int *handle, char *text, unsigned length) { snprintf(text, length, "GPU-%d", *handle); return 0; }
int nvmlDeviceGetMemoryInfo(int *handle, memory_t *memory) {
  if (*handle == 1) return 3;
  memory->total = 85520809984ULL; memory->free = 1; memory->used = 2; return 0;
}
int nvmlDeviceGetPciInfo_v3(int *handle, pci_t *pci) {
  memset(pci, 0, sizeof *pci); snprintf(pci->bus_id, 32, "00000000:%02X:00.0", 0x18 + *handle); return 0;
}
int nvmlDeviceGetCudaComputeCapability(int *handle, int *major, int *minor) {
  *major = 9 + *handle; *minor = 0; return 0;
}
"""


def build(folder: Path, init_status: int) -> str:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    source, library = folder / "nvml.c", folder / f"libnvml{init_status}.so"
    source.write_text(_SOURCE)
    command = [compiler, "-shared", "-fPIC", f"-DINIT_STATUS={init_status}", "-o", str(library), str(source)]
    subprocess.run(command, check=True)
    return str(library)


def test_the_drivers_answers_are_read_and_the_session_is_closed(tmp_path: Path) -> None:
    library = build(tmp_path, 0)
    assert read_driver(library) == NvidiaDriver(
        "580.82.07",
        (
            NvidiaDevice("GPU 0", "GPU-0", "00000000:18:00.0", 85520809984, (9, 0)),
            NvidiaDevice("GPU 1", "GPU-1", "00000000:19:00.0", None, (10, 0)),
        ),
    )
    assert ctypes.CDLL(library).open_sessions() == 0


def test_a_failing_call_is_an_error_in_the_drivers_words(tmp_path: Path) -> None:
    with pytest.raises(PlatformError, match=r"nvmlInit_v2 failed: Driver Not Loaded \(status 9\)"):
        read_driver(build(tmp_path, 9))


def test_a_missing_library_names_the_driver() -> None:
    with pytest.raises(PlatformError, match="Install the NVIDIA driver"):
        read_driver("libno-such-nvml.so.1")
