"""What this machine can do. torch is imported inside the functions, so that `--help` stays fast."""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import math
import os
import re
import shutil
import traceback
from dataclasses import dataclass
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


def capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of a GPU, (8, 0) for an A100; None without one."""
    import torch

    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def c_compiler(kind: str) -> str | None:
    """What torch.compile builds with: a C compiler for a GPU's launchers (`$CC`, gcc, clang), else C++ (`$CXX`, g++).

    None where there is none.
    """
    named = os.environ.get("CC" if kind == "cuda" else "CXX")
    names = [named] if named else ["gcc", "clang"] if kind == "cuda" else ["g++"]
    return next((found for name in names if (found := shutil.which(name))), None)


def total_memory(device: torch.device) -> int:
    """Bytes of memory of the device (a GPU's own; the machine's for a CPU)."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@dataclass(frozen=True)
class Card:
    """What the maker's data sheet says of a GPU.

    Attributes:
        name: words of the name that its driver gives it, which must all be there.
        flops: dense matrix products in bf16 (fp16 before Ampere) with fp32 sums, FLOP/s.
        gigabytes: of memory, 10^9 bytes; a little less than most drivers show.
        capability: CUDA's compute capability, on AMD's what torch makes of the gfx number.
        amd: whether it is AMD's, by ROCm.
    """

    name: str
    flops: float
    gigabytes: int
    capability: tuple[int, int]
    amd: bool = False

    @property
    def slug(self) -> str:
        """The name as a command line has it: a100-80gb."""
        return self.name.lower().replace(" ", "-")


# The makers' data sheets, for GeForce the architecture's whitepaper. The first whose words are all there counts, so
# what is more special stands first. A card that is not here has no MFU.
CARDS = (
    Card("GB300", 2.5e15, 288, (10, 3)),
    Card("B300", 2.25e15, 288, (10, 3)),
    Card("GB200", 2.5e15, 186, (10, 0)),
    Card("B200", 2.25e15, 180, (10, 0)),
    Card("B100", 1.75e15, 180, (10, 0)),
    Card("GH200", 989e12, 96, (9, 0)),
    Card("H200 NVL", 835e12, 141, (9, 0)),
    Card("H200", 989e12, 141, (9, 0)),
    Card("H100 PCIe", 756e12, 80, (9, 0)),
    Card("H100 NVL", 835e12, 94, (9, 0)),
    Card("H100", 989e12, 80, (9, 0)),
    Card("H800 PCIe", 756e12, 80, (9, 0)),
    Card("H800", 989e12, 80, (9, 0)),
    Card("H20", 148e12, 96, (9, 0)),
    Card("A100 80GB", 312e12, 80, (8, 0)),
    Card("A100", 312e12, 40, (8, 0)),
    Card("A800 80GB", 312e12, 80, (8, 0)),
    Card("A800", 312e12, 40, (8, 0)),
    Card("A40", 149.7e12, 48, (8, 6)),
    Card("A30", 165e12, 24, (8, 0)),
    Card("A10G", 70e12, 24, (8, 6)),
    Card("A10", 125e12, 24, (8, 6)),
    Card("L40S", 362e12, 48, (8, 9)),
    Card("L40", 181e12, 48, (8, 9)),
    Card("L4", 121e12, 24, (8, 9)),
    Card("RTX 6000 Ada", 364e12, 48, (8, 9)),
    Card("RTX A6000", 154.8e12, 48, (8, 6)),
    Card("RTX 5090", 209.5e12, 32, (12, 0)),
    Card("RTX 4090", 165.2e12, 24, (8, 9)),
    Card("RTX 3090 Ti", 80e12, 24, (8, 6)),
    Card("RTX 3090", 71e12, 24, (8, 6)),
    Card("V100 PCIE 32GB", 112e12, 32, (7, 0)),
    Card("V100 PCIE", 112e12, 16, (7, 0)),
    Card("V100 32GB", 125e12, 32, (7, 0)),
    Card("V100", 125e12, 16, (7, 0)),
    Card("T4", 65e12, 16, (7, 5)),
    Card("MI355X", 2.5e15, 288, (9, 5), amd=True),
    Card("MI350X", 2.3e15, 288, (9, 5), amd=True),
    Card("MI325X", 1307e12, 256, (9, 4), amd=True),
    Card("MI300X", 1307e12, 192, (9, 4), amd=True),
    Card("MI300A", 980e12, 128, (9, 4), amd=True),
)
# Cards and parts of cards that share a name's words with a faster one.
_OTHER_CARDS = {"Laptop", "D", "MIG", "GRID", "Max"}
# Words that people write beside a card's name and that tell nothing more.
_BESIDE = {"nvidia", "amd", "geforce", "tesla", "instinct", "gpu", "sxm"}
_PRODUCT_SIZE = 1024


def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s that MFU is measured against: the data sheet's for a known GPU, a measured product's on a CPU."""
    if device.type == "cuda":
        return data_sheet_flops(device_name(device))
    if device.type == "cpu":
        return _measured_flops(precision)
    return None


def data_sheet_flops(name: str) -> float | None:
    """The peak of a card by the name that its driver gives it; None for a card that is not known.

    fp8 is measured against bf16's peak too, so that an MFU says how much faster it made the same work.
    """
    words = set(re.split(r"[\s\-/]+", name))
    if words & _OTHER_CARDS:
        return None
    return next((card.flops for card in CARDS if words.issuperset(card.name.split())), None)


def card_named(name: str) -> Card | None:
    """The card that a person means: h100, a100-80gb, "NVIDIA RTX 4090"; None for one that is not known."""
    words = set(re.split(r"[\s\-_/]+", name.strip().lower())) - _BESIDE
    for card in CARDS:
        own = set(card.slug.split("-"))
        # The size may be said where it needs not be: a100-40gb.
        if own <= words <= own | {f"{card.gigabytes}gb"}:
            return card
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


# Options of glibc's mallopt.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8


def keep_freed_memory(*, one_heap: bool = False) -> None:
    """Let this process use again what it frees, where the C library can: the same sizes come back in every step.

    The system clears each page that it hands out, which was a twentieth of a step. glibc gives the free end of its heap
    back at once; only blocks from 32 MiB on, the most that glibc itself goes to, come from the system each time now.

    Where the environment sets glibc's options (MALLOC_..., GLIBC_TUNABLES), these stay.

    Args:
        one_heap: threads that begin from now on share one heap, as others give back more. Operations that several
            threads share are slower with it: these then wait for each other to allocate.
    """
    import ctypes

    if any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ):
        return
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, 32 << 20)
        mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)
        if one_heap:
            mallopt(_ARENA_MAX, 1)


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
