"""What this machine can do. torch is imported inside the functions, so that `--help` stays fast."""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import math
import os
import traceback
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def cpu_cores() -> int:
    """The cores that this process may use (its affinity, not the machine's count)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def best_device() -> torch.device:
    """CUDA when a GPU is visible, else Apple's MPS, else the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def device_name(device: torch.device) -> str:
    """The name that people know a device by: the card's, or the processor's model."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


@functools.cache
def cpu_name() -> str:
    """The processor's model as the system names it."""
    import platform

    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16 faster than fp32 (Ampere on; AVX512-BF16 or AMX on a CPU)."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


def total_memory(device: torch.device) -> int:
    """Bytes of memory of the device (a GPU's own; the machine's for a CPU)."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# Dense bf16 (fp16 before Ampere) matrix-product peaks of the makers' data sheets, FLOP/s. The first name that the
# card's own name contains counts, so longer names stand before their prefixes.
_PEAK_FLOPS = {
    "B200": 2.25e15,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}
_PRODUCT_SIZE = 1024


def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s that MFU is measured against: the data sheet's for a known GPU, a measured product's on a CPU."""
    if device.type == "cuda":
        name = device_name(device)
        return next((peak for known, peak in _PEAK_FLOPS.items() if known in name), None)
    if device.type == "cpu":
        return _measured_flops(precision)
    return None


@functools.cache
def _measured_flops(precision: str) -> float:
    """The rate of a 1024-cube matrix product on this CPU, the best of five; random state is not touched."""
    import time

    import torch

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left = torch.full((_PRODUCT_SIZE, _PRODUCT_SIZE), 0.5, dtype=dtype)
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        left @ left
        best = min(best, time.perf_counter() - start)
    return 2 * _PRODUCT_SIZE**3 / best


def memory_in_use(device: torch.device) -> int:
    """Bytes in use: the allocator's peak on a GPU; on a CPU the anonymous memory of this process and its children.

    On a CPU it is the proportional size without memory-mapped files (Pss_Anon of /proc), 0 where that is not known.
    """
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    return sum(_anonymous_bytes(pid) for pid in _process_tree(os.getpid()))


def peak_resident_bytes() -> int:
    """The highest resident size of this process so far, memory-mapped files included."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def return_freed_memory() -> None:
    """Give memory that was freed back to the system, where the C library can (glibc keeps what lies between)."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


# What torch's allocators and CUDA's libraries say, each as a plain RuntimeError.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device or this machine had no memory left."""
    if isinstance(error, MemoryError):  # Python, numpy, C++
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if not isinstance(error, RuntimeError):
        return False
    import torch

    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _OUT_OF_MEMORY)


def free_memory(error: BaseException | None = None) -> None:
    """Give back what nothing uses: garbage, and the cache of a GPU's allocator.

    Args:
        error: one that was caught: the frames of its traceback hold the tensors that filled the memory, and are
            emptied. The traceback can still be printed.
    """
    import torch

    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _process_tree(pid: int) -> list[int]:
    children: list[int] = []
    with contextlib.suppress(OSError, ValueError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children", encoding="ascii") as file:
                children.extend(int(child) for child in file.read().split())
    return [pid, *(descendant for child in children for descendant in _process_tree(child))]


def _anonymous_bytes(pid: int) -> int:
    with contextlib.suppress(OSError, ValueError), open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
        for line in file:
            if line.startswith("Pss_Anon:"):
                return int(line.split()[1]) * 1024
    return 0
