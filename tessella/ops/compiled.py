"""Whether batches are made by compiled kernels or by torch.

Both follow the same plan and agree within rounding. The compiled kernels are several times faster on a CPU; where numba
cannot be imported or cannot compile, torch does it all.
"""

from __future__ import annotations

import warnings
from functools import cache
from types import ModuleType


@cache
def kernels() -> ModuleType | None:
    """`ops.kernels`, or None where there is no numba; importing it takes half a second, the first time ten.

    The first time is once per machine and installation: the result is kept beside the module, or, where that is not
    writable, in the user's cache folder.
    """
    try:
        from tessella.ops import kernels as found
    except (
        Exception
    ) as error:  # besides a missing package: an incompatible NumPy, no place for the cache, LLVM's errors
        warnings.warn(
            f"views are made without compiled kernels, slower: {error} (`pip install numba` for a missing one; "
            "for a missing place set NUMBA_CACHE_DIR to a folder that can be written to)",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return found


def in_words() -> str:
    """Who makes the views here, for the record of a run: results of the two differ in the last bits."""
    return "torch" if kernels() is None else "compiled"
