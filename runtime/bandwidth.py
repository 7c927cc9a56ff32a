"""How fast this machine reads memory: what no product of weights that come from there can beat."""

import threading

import numpy as np

from elsa_compile.runtime.kernel_timing import pick_clock

_BYTES = 256 << 20  # beyond the caches of most processors
_RUNS = 5


def read_gb_per_s(threads: int | None = None, size: int = _BYTES) -> float:
    """10^9 bytes a second that so many threads read together, the fastest of 5 runs.

    The largest of many whole numbers is looked for, which takes the processor less time than
    reading them. Weights that fit the last cache may be read faster than this.

    Args:
        threads: None takes every core this process may use.
        size: bytes to read.
    """
    from elsa_compile.runtime.session import usable_cores

    count = threads or usable_cores()
    held = np.zeros(size // 8, dtype=np.int64)
    held += 1  # zeros are not in memory before they are written
    parts = np.array_split(held, count)

    def read(part: "np.ndarray[tuple[int], np.dtype[np.int64]]") -> None:
        part.max()

    _, clock = pick_clock(count)
    best = float("inf")
    for _ in range(_RUNS):
        others = [threading.Thread(target=read, args=(part,)) for part in parts[1:]]
        started = clock()
        for thread in others:
            thread.start()
        read(parts[0])
        for thread in others:
            thread.join()
        best = min(best, clock() - started)
    return held.nbytes / best / 1e9
