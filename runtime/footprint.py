"""Load time and memory of one model file, measured in a process that does nothing else.

`python -m elsa_compile.runtime.footprint MODEL` prints one JSON object; `measure` runs that.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import elsa_compile
from elsa_compile.runtime.errors import ElsaError
from elsa_compile.runtime.onnx_file import ModelFile
from elsa_compile.runtime.provider import ENVIRONMENT as KERNELS_ENVIRONMENT

_TIMEOUT_S = 1800


def measure(path: Path, threads: int | None, provider: str, stock: bool = False) -> dict[str, Any]:
    """Open a model, already checked by the caller, in a fresh process and run it once.

    Args:
        path: the .onnx file.
        threads: as in `session`.
        provider: as in `session`.
        stock: without our kernels.

    Returns:
        load_s, and load_cpu_s of it, spent by this process on the CPU; and in bytes, null where
        the system does not tell: baseline_rss_bytes (onnxruntime imported, no model),
        loaded_rss_bytes, growth_bytes (loaded - baseline), peak_rss_bytes (loading and one run
        included).

    Raises:
        ElsaError: the process failed.
    """
    command = [sys.executable, "-m", __name__, str(path), str(threads or 0), provider]
    # The package may have been found through sys.path alone, which a child does not inherit.
    home = str(Path(elsa_compile.__file__).parents[1])
    paths = [home, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    if stock:
        environment[KERNELS_ENVIRONMENT] = "0"
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        raise ElsaError(f"{path}: loading it took over {_TIMEOUT_S} s") from None
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ElsaError(f"{path}: measuring its memory failed: {reason}")
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def _memory(key: str) -> int | None:
    """VmRSS or VmHWM of this process in bytes; None where there is no /proc."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _peak() -> int | None:
    """The most memory this process ever had, in bytes."""
    peak = _memory("VmHWM")
    if peak is not None or sys.platform == "win32":
        return peak
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main(argv: list[str]) -> int:
    """Measure and print. argv: path, threads (0 = all), provider."""
    import onnxruntime  # noqa: F401 - its own memory belongs to the baseline

    from elsa_compile.runtime.session import session
    from elsa_compile.runtime.workloads import workloads

    path, threads, provider = Path(argv[0]), int(argv[1]) or None, argv[2]
    # Only what `workloads` needs: the caller has checked the file, and parsing it here would count.
    before = _memory("VmRSS")
    started, used = time.perf_counter(), time.process_time()
    opened = session(path, threads, provider, checked=_unparsed(path))
    load_s, load_cpu_s = time.perf_counter() - started, time.process_time() - used
    loaded = _memory("VmRSS")
    for work in workloads(opened, path, prefill=[32], context=[32], steps=1):
        work.run()
    result = {
        "load_s": load_s,
        "load_cpu_s": load_cpu_s,
        "baseline_rss_bytes": before,
        "loaded_rss_bytes": loaded,
        "growth_bytes": None if before is None or loaded is None else loaded - before,
        "peak_rss_bytes": _peak(),
    }
    print(json.dumps(result))
    return 0


def _unparsed(path: Path) -> ModelFile:
    """A description that says nothing: keeps `session` from parsing the file a second time."""
    return ModelFile(path, "generic", 0, (), (), {}, (), 0, {}, path.stat().st_size, 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
