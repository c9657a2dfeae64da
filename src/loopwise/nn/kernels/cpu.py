"""Compiling the kernels with the system's C++ compiler on first use, and calling them through ctypes.

They know nothing of torch, so they compile in about three seconds; the result is kept in a per-user cache folder.
Where it cannot be had (no compiler, not Linux, LOOPWISE_KERNELS=off) there is a reason in words, and every kernel has
an equal written with torch's own operations.
"""

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("launch.cpp")
"""It includes `cpu.cpp` and `rows.cpp`."""
SWITCH = "LOOPWISE_KERNELS"
COMPILE_SECONDS = 120
# The source keeps clear of infinities, which -ffast-math does not know; it needs the freedom to reorder sums.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffast-math", "-fopenmp", "-fPIC")
# Given its own way, GCC takes half of what AVX-512 offers on most processors that have it.
X86_FLAGS = ("-mprefer-vector-width=512",)


@dataclass(frozen=True)
class CPUKernels:
    """The compiled functions by dtype; their arguments are those of the last lines of `cpu.cpp`."""

    attend: dict[torch.dtype, Callable[..., int]]
    linear: dict[torch.dtype, Callable[..., None]]


@dataclass(frozen=True)
class Loaded:
    """The kernels, or why there are none."""

    kernels: CPUKernels | None
    reason: str | None


def load_cpu_kernels() -> CPUKernels | None:
    """The compiled kernels; None where they cannot be had, see `why_no_cpu_kernels`. Compiles on the first call."""
    return _load().kernels


def why_no_cpu_kernels() -> str | None:
    """Why `load_cpu_kernels` returns None, in words; None when it does not."""
    return _load().reason


class _Unavailable(Exception):
    """The kernels cannot be had, for the reason given."""


@cache
def _load() -> Loaded:
    try:
        return Loaded(_open(_compiled()), None)
    except (_Unavailable, OSError) as error:
        return Loaded(None, str(error))


def load_library(source: Path = SOURCE) -> ctypes.CDLL | None:
    """The kernels, or another file of them, compiled alike; None where that cannot be had."""
    try:
        return ctypes.CDLL(str(_compiled(source)))
    except (_Unavailable, OSError):
        return None


def _compiled(source: Path = SOURCE) -> Path:
    """Path of the shared library, compiled now unless the cache folder has it."""
    if os.environ.get(SWITCH, "") == "off":
        raise _Unavailable(f"{SWITCH}=off")
    if sys.platform != "linux":
        raise _Unavailable(f"the kernels are for Linux; this is {sys.platform}")
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise _Unavailable("there is no C++ compiler: install g++, or name one in CXX")
    runtime = _openmp_runtime()
    flags = FLAGS + (X86_FLAGS if platform.machine() == "x86_64" else ())
    version = _run([compiler, "--version"])
    identity = "\0".join((*_texts(source), version, *flags, str(runtime), _processor()))
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "loopwise"
    library = folder / f"{source.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:20]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Compiled aside and moved, so that no process ever sees half a file; the last of several wins, all are equal.
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            thing, made = Path(aside) / "cpu.o", Path(aside) / "cpu.so"
            _run([compiler, *flags, "-c", str(source), "-o", str(thing)])
            # Linked without -fopenmp, which would bring a second OpenMP runtime into the process: its threads and
            # torch's would spin against each other. And without -ffast-math, which would link code that flushes
            # denormals to zero for the whole process.
            _run([compiler, "-shared", str(thing), "-o", str(made), str(runtime), "-lm"])
            os.replace(made, library)
    return library


def _texts(source: Path) -> list[str]:
    """What a source says, and what the sources that it includes say."""
    text = source.read_text()
    return [text, *(source.with_name(name).read_text() for name in re.findall(r'#include "(.+)"', text))]


def _open(path: Path) -> CPUKernels:
    library = ctypes.CDLL(str(path))
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    attend, linear = {}, {}
    for dtype, name in ((torch.float32, "float32"), (torch.float64, "float64")):
        attend[dtype] = getattr(library, f"loopwise_attend_{name}")
        attend[dtype].argtypes = (*[pointer] * 7, ctypes.POINTER(size), ctypes.c_double, ctypes.c_int)
        linear[dtype] = getattr(library, f"loopwise_linear_{name}")
        linear[dtype].argtypes = (*[pointer] * 3, *[size] * 3, ctypes.c_int)
        linear[dtype].restype = None
    return CPUKernels(attend, linear)


class _SymbolInfo(ctypes.Structure):
    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _openmp_runtime() -> Path:
    """The library that gives torch its threads: wheels bring their own under a name of their own."""
    try:
        symbol = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")).GOMP_parallel
    except (OSError, AttributeError):
        raise _Unavailable("this torch was built without GNU OpenMP") from None
    found = _SymbolInfo()
    if not ctypes.CDLL(None).dladdr(ctypes.cast(symbol, ctypes.c_void_p), ctypes.byref(found)):
        raise _Unavailable("the system does not say where torch's OpenMP library is")
    return Path(os.fsdecode(found.file))


def _processor() -> str:
    """Everything -march=native may depend on."""
    text = Path("/proc/cpuinfo").read_text()
    first, _, _ = text.partition("\n\n")
    changing = ("cpu MHz", "bogomips", "processor", "apicid", "initial apicid", "core id")
    return "\n".join(line for line in first.splitlines() if not line.startswith(changing))


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=COMPILE_SECONDS)
    except subprocess.TimeoutExpired:
        raise _Unavailable(f"{command[0]} took more than {COMPILE_SECONDS} seconds") from None
    if done.returncode != 0:
        raise _Unavailable(f"{command[0]} failed: {done.stderr.strip()[-500:]}")
    return done.stdout
