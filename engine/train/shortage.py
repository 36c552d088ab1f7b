"""Which errors mean that memory ran out, and what the system says of it.

Apart, and without torch, because they come from the computer, from CUDA and from whatever library
asked last, and because a run and a measurement answer them differently.
"""

import re

from engine.visible import visible

_WORDS = (
    *("can't allocate memory", "not enough memory"),  # torch's allocator, a plain RuntimeError
    *("out of memory", "CUDA_ERROR_OUT_OF_MEMORY", "cudaErrorMemoryAllocation"),  # CUDA's
    "_STATUS_ALLOC_FAILED",  # cuBLAS, cuDNN, cuSOLVER and cuSPARSE, which allocate on their own
)
_ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+) (bytes|[KMG]iB)")
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def is_shortage(error: BaseException) -> bool:
    """Whether `error` says that there is no more memory."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in _WORDS)


def words_of(error: BaseException) -> str:
    """The first two sentences of what the system says, without the last full stop."""
    said = visible(next(iter(str(error).splitlines()), "") or type(error).__name__, one_line=True)
    return ". ".join(said.rpartition("DefaultCPUAllocator: ")[2].split(". ")[:2]).rstrip(".")


def asked_bytes(error: BaseException) -> int | None:
    """What was asked for when memory ran out, as torch says it; None where it does not."""
    found = _ASKED.search(str(error))
    return int(float(found[1]) * _UNITS[found[2]]) if found else None
