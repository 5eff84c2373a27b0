"""How much memory is free, and how host, torch, CUDA and cuBLAS say that it ran out."""

import os

import torch

TEXTS = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED", "std::bad_alloc")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says so; torch has no class of its own for the host, nor for all that CUDA says."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in TEXTS)
    )


def free_memory(device: torch.device) -> int:
    """How many bytes a device has left: a guess of 4 GiB where the host does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    known = "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", ())  # on Linux
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGESIZE") if known else 4 << 30


def free_cached_memory() -> None:
    """Give back what torch keeps of a GPU's freed memory."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()
