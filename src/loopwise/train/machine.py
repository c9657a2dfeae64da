"""What this machine can do, measured, and what it is: the limits that speeds are compared with."""

import ctypes
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from loopwise.errors import ConfigError

CPU_SIZES = (512, 1024, 2048)
ACCELERATOR_SIZES = (4096, 8192)
DEFAULT_CACHE_BYTES = 32 * 2**20
LARGEST_BUFFER_BYTES = 2 * 2**30
DRIFT = 0.15
PROBE_COPY_BYTES = 256 * 2**20


# Options of glibc's mallopt, from its malloc.h, and one of Linux's madvise.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
MADV_HUGEPAGE = 14
HUGE_PAGE_BYTES = 2 * 2**20


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One measurement of the two limits."""

    matmul: float
    """Floating-point operations per second of square matrix products."""
    copy: float
    """Bytes per second that a copy moves, reads and writes counted."""


class Probe:
    """Measures the machine before and after a benchmark, which is void if the machine changed meanwhile.

        probe = Probe(dtype=torch.float32)
        probe.read(); run(); probe.read()
        if probe.drifted: throw the run away

    Quantities drift when something else runs on the machine, or when its clock is lowered.
    """

    def __init__(
        self, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", tolerance: float = DRIFT
    ) -> None:
        if not 0.0 < tolerance < 1.0:
            raise ConfigError(f"Probe(tolerance={tolerance}): use a share between 0 and 1, such as {DRIFT}")
        self.dtype = dtype
        self.device = torch.device(device)
        self.tolerance = tolerance
        self.readings: list[Reading] = []
        """All measurements, in order."""

    def read(self) -> Reading:
        """Measures now; about a second."""
        copy = copy_bandwidth(self.device, size=PROBE_COPY_BYTES)
        reading = Reading(matmul=matmul_peak(self.dtype, self.device), copy=copy)
        self.readings.append(reading)
        return reading

    @property
    def drift(self) -> float:
        """Largest relative spread of either limit over the readings so far, (max - min) / max."""
        spreads = [0.0]
        for limit in ([r.matmul for r in self.readings], [r.copy for r in self.readings]):
            if limit:
                spreads.append((max(limit) - min(limit)) / max(limit))
        return max(spreads)

    @property
    def drifted(self) -> bool:
        """Whether the machine changed by more than the tolerance."""
        return self.drift > self.tolerance


def matmul_peak(
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    threads: int | None = None,
    *,
    seconds: float = 0.5,
) -> float:
    """Best measured FLOP/s of a square matrix product, over a few sizes; takes about `seconds`.

    A product of n x n matrices counts 2 n^3 operations. `threads`: for the CPU only, restored afterwards; None
    leaves the present number.
    """
    device = torch.device(device)
    sizes = CPU_SIZES if device.type == "cpu" else ACCELERATOR_SIZES
    with _threads(threads):
        return max(_matmul_rate(size, dtype, device, seconds / len(sizes)) for size in sizes)


def copy_bandwidth(
    device: str | torch.device = "cpu", threads: int | None = None, *, size: int | None = None, seconds: float = 0.3
) -> float:
    """Best measured bytes/s of a copy between two buffers, counting what is read and what is written.

    `size` in bytes; by default each buffer is four times the last-level cache (`buffer_bytes`).
    """
    elements = (size or buffer_bytes(device)) // 4
    source = torch.ones(elements, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    with _threads(threads):
        return 2 * 4 * elements / _best_time(lambda: target.copy_(source), torch.device(device), seconds)


def read_bandwidth(
    device: str | torch.device = "cpu", threads: int | None = None, *, size: int | None = None, seconds: float = 0.3
) -> float:
    """Best measured bytes/s of a sum over a buffer: the limit of decoding, which only reads weights."""
    elements = (size or buffer_bytes(device)) // 4
    source = torch.ones(elements, dtype=torch.float32, device=device)
    with _threads(threads):
        return 4 * elements / _best_time(lambda: source.sum(), torch.device(device), seconds)


def buffer_bytes(device: str | torch.device = "cpu") -> int:
    """A buffer that no cache holds: four times the last-level cache, at most 2 GiB and an eighth of the free memory."""
    device = torch.device(device)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        cache, free = properties.L2_cache_size, torch.cuda.mem_get_info(device)[0]
    else:
        cache, free = _last_level_cache(), _free_memory()
    return min(4 * cache, LARGEST_BUFFER_BYTES, free // 8)


def keep_freed_memory() -> bool:
    """From now on this process keeps what it frees for its own next allocation, instead of returning it to the system.

    A training step frees and allocates the same large tensors again and again. glibc hands blocks of more than 32 MiB,
    and the free end of its heap, back to the kernel, and the next step pays for every page of them: a fault, and zeros
    written. Within a virtual machine that was some 30% of a step at width 512.

    The cost: the process holds its peak until it ends, for everything that runs in it, and fragments that no later
    request fits stay unused. Only glibc on Linux has these settings; elsewhere nothing happens and False is returned.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    made = [
        library.mallopt(M_MMAP_MAX, 0),
        library.mallopt(M_TRIM_THRESHOLD, -1),
        library.mallopt(M_TOP_PAD, 64 * 2**20),
    ]
    _ask_for_huge_pages(library, _free_memory() // 2)
    return all(made)


def _ask_for_huge_pages(library: ctypes.CDLL, size: int) -> None:
    """Let the next `size` bytes of the heap come in pages of 2 MiB: fewer faults, and fewer walks of page tables.

    The heap grows by an allocation that is never touched, and keeps what is freed. Where the system refuses, nothing is
    lost.
    """
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
    library.free.restype, library.free.argtypes = None, (ctypes.c_void_p,)
    library.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    block = library.malloc(size)
    if block is None:
        return
    first = -(-block // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    last = (block + size) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    if last > first:
        library.madvise(first, last - first, MADV_HUGEPAGE)
    library.free(block)


def environment(device: str | torch.device = "cpu") -> dict[str, Any]:
    """What the run ran on, for `environment.json`: versions, processor, threads, memory, device, code revision.

    No host or user names.
    """
    device = torch.device(device)
    packages = ("loopwise", "torch", "numpy", "safetensors", "transformers", "tokenizers")
    record: dict[str, Any] = {
        "python": platform.python_version(),
        "implementation": sys.implementation.name,
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in packages},
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _total_memory(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "device": str(device),
        "revision": revision(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        record["accelerator"] = {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "count": torch.cuda.device_count(),
        }
    return record


def revision(folder: str | Path | None = None) -> str | None:
    """Git revision of the source tree that holds `folder` (default: this package), with `-dirty` for local changes.

    None if it is not a git checkout or git is not installed.
    """
    git = shutil.which("git")
    if git is None:
        return None
    here = Path(folder) if folder is not None else Path(__file__).parent

    def ask(*arguments: str) -> str | None:
        done = subprocess.run([git, "-C", str(here), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    # A package inside site-packages of some other project's checkout is not that project's code.
    if not ask("ls-files", "--", str(here)):
        return None
    head = ask("rev-parse", "HEAD")
    changed = ask("status", "--porcelain", "--untracked-files=no")
    return f"{head}-dirty" if head and changed else head


def _matmul_rate(size: int, dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    # Random numbers: constant ones switch fewer transistors, and an accelerator at its power limit then runs faster.
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    out = torch.empty(size, size, dtype=dtype, device=device)
    return 2.0 * size**3 / _best_time(lambda: torch.mm(left, right, out=out), device, seconds)


def _best_time(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Shortest of at least three repetitions, after one that does not count, within about `seconds`."""

    def timed() -> float:
        started = time.perf_counter()
        work()
        _wait(device)
        return time.perf_counter() - started

    _wait(device)
    timed()
    deadline = time.perf_counter() + seconds
    times = [timed() for _ in range(3)]
    while time.perf_counter() < deadline:
        times.append(timed())
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        if count is not None:
            torch.set_num_threads(before)


def _last_level_cache() -> int:
    sizes = [DEFAULT_CACHE_BYTES]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        if text.endswith("K") and text[:-1].isdigit():
            sizes.append(int(text[:-1]) * 1024)
    return max(sizes)


def _memory_line(name: str) -> int | None:
    file = Path("/proc/meminfo")
    if not file.exists():
        return None
    for line in file.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None


def _free_memory() -> int:
    return _memory_line("MemAvailable") or 4 * 2**30


def _total_memory() -> int | None:
    return _memory_line("MemTotal")


def _cpu_model() -> str:
    file = Path("/proc/cpuinfo")
    if file.exists():
        for line in file.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
