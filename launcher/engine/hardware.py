"""Configures and queries the machine of a rank: threads, memory, numerics."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import resource
import sys
from pathlib import Path

import torch

from launcher.engine.runtime import Runtime


def configure(runtime: Runtime, cpus_per_worker: float, deterministic: bool) -> None:
    """Set the number of threads and the numerics of this process.

    On CPUs a worker uses as many threads as the cores that it reserved. In deterministic mode it uses one thread,
    because kernels split sums by threads, and results must not depend on the number of cores.
    """
    if runtime.device.type == "cuda":
        torch.set_float32_matmul_precision("highest" if deterministic else "high")
        torch.backends.cudnn.benchmark = not deterministic
        torch.backends.cudnn.deterministic = deterministic
        # PyTorch then raises an error for algorithms with atomic additions, which are not deterministic.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(deterministic)
        return
    if deterministic:
        torch.set_num_threads(1)
    elif runtime.world_size == 1:
        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    else:
        torch.set_num_threads(max(1, int(cpus_per_worker)))


def keep_compiled(run_root: Path) -> None:
    """Store the cache of `torch.compile` below the run root, where the next run can use it.

    PyTorch's default is a temporary directory, which a new machine or container does not have. A directory that the
    user has set with TORCHINDUCTOR_CACHE_DIR is not changed.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # Importing the compiler sets the variable to its default.
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR") in (None, default_cache_dir()):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(run_root / ".cache" / "torchinductor")


def release_memory(device: torch.device) -> None:
    """Release the memory of a finished task to the device and to the operating system."""
    gc.collect()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # otherwise compiled networks are never freed
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError, AttributeError):  # only glibc has malloc_trim
        ctypes.CDLL(None).malloc_trim(0)


def memory_of_a_worker(runtime: Runtime, gpus_per_worker: float | None) -> float:
    """Return the bytes that this rank may use: of its GPU, or its part of the memory of the machine or container."""
    if runtime.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(runtime.device)
        total = torch.cuda.get_device_properties(runtime.device).total_memory
        share = min(1.0, gpus_per_worker or 1.0)
        return min(total * share, free + torch.cuda.memory_reserved(runtime.device))
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # "max": no limit
            whole = min(whole, int(Path(limit).read_text()))
    return whole / runtime.local_world_size


def kind_of(device: torch.device) -> str:
    """Return the model of a GPU, or the model and number of threads of a CPU; they determine how a device rounds."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} thread(s)"


def allocated_gib(device: torch.device) -> float:
    """Return the memory of this rank, GiB: the peak allocation of PyTorch on the GPU, or the resident process size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30  # macOS counts bytes
