"""How host, torch, CUDA and cuBLAS say that memory ran out."""

TEXTS = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED", "std::bad_alloc")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says so; torch has no class of its own for the host, nor for all that CUDA says."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in TEXTS)
    )
