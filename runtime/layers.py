"""Where the time of a run goes, node by node, through onnxruntime's profiler.

Profiling slows small nodes down and its clock ticks in microseconds: shares are to be trusted, sums
are not, and speeds are compared without it (`bench`).
"""

import json
import math
import re
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from elsa_compile.runtime import provider as sparse
from elsa_compile.runtime.errors import ElsaError
from elsa_compile.runtime.onnx_constants import Constant, Constants
from elsa_compile.runtime.onnx_file import ModelFile, load_checked
from elsa_compile.runtime.onnx_tensors import DTYPES
from elsa_compile.runtime.session import note_shared_caches, shares_caches
from elsa_compile.runtime.workloads import workloads

_RUNS = 5
_WARMUP = 2
_END = "_kernel_time"
_PRODUCTS = ("MatMul", "Gemm")
_ATTENTION = "Attention"
_FEW = 4  # tokens; lanes are read by up to so many, perhaps by more
_NARROW = ("bfloat16", "float16")  # values kept in two bytes


def profile(
    opened: Any, file: ModelFile, prefill: Sequence[int], context: Sequence[int], keep: int = 1
) -> dict[str, list[dict[str, Any]]]:
    """Time every node of a prefill and of decoding, at the first length of each.

    Args:
        opened: a session of this file; its options and providers are used for others.
        file: the checked file.
        prefill: as in `bench`.
        context: as in `bench`.
        keep: as in `workloads`.

    Returns:
        By workload: one row a node, slowest first: node, op, kernel ("cpu", "cuda" or the packed
        format of ours), seconds (median of 5 runs), weight_bytes, gb_per_s (10^9 bytes of weights a
        second; None without weights), share (of the sum).

    Raises:
        ElsaError: the profile cannot be read.
    """
    claims = sparse.claims() if sparse.NAME in opened.get_providers() else []
    sizes = _weight_bytes(file)
    tables = {}
    for work in workloads(opened, file.path, prefill[:1], context[:1], 1, keep=keep):
        with tempfile.TemporaryDirectory(prefix="elsa-profile-") as folder:
            profiled = _profiled(opened, file.path, Path(folder) / "run")
            made = workloads(profiled, file.path, prefill[:1], context[:1], 1, keep=keep)
            mine = next(each for each in made if each.name == work.name)
            for _ in range(_WARMUP + _RUNS):
                mine.run()
            events = json.loads(Path(profiled.end_profiling()).read_text(encoding="utf-8"))
        tables[work.name] = _rows(events, claims, _order(profiled), sizes)
    return tables


def _profiled(opened: Any, path: Path, prefix: Path) -> Any:
    """The same session again, with its profiler on."""
    import onnxruntime

    known = opened.get_session_options()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = known.intra_op_num_threads
    options.log_severity_level = 4
    options.add_session_config_entry("session.load_model_format", "ONNX")
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    options.enable_profiling = True
    options.profile_file_prefix = str(prefix)
    names: list[str] | None = opened.get_providers()
    if sparse.NAME in opened.get_providers():
        given = {"cache": "shared"} if shares_caches(opened) else {}
        options.add_provider_for_devices(sparse.devices(onnxruntime), given)
        names = None
    try:
        made = onnxruntime.InferenceSession(str(path), options, providers=names, enable_fallback=0)
    except Exception as error:
        raise ElsaError(f"{path}: it cannot be opened for profiling: {error}") from None
    if shares_caches(opened):
        note_shared_caches(made)
    return made


def _rows(
    events: Sequence[Mapping[str, Any]],
    claims: Sequence[Mapping[str, Any]],
    order: Sequence[Mapping[str, str]],
    sizes: Mapping[str, int],
) -> list[dict[str, Any]]:
    """A table from the profiler's events; the last 5 runs count."""
    runs = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e["name"] == "model_run")
    if len(runs) < _RUNS:
        raise ElsaError(f"onnxruntime's profile has {len(runs)} runs, wanted {_RUNS} or more")
    runs = runs[-_RUNS:]
    seconds: dict[str, list[float]] = {}
    about: dict[str, Mapping[str, Any]] = {}
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith(_END):
            continue
        run = next((i for i, (a, b) in enumerate(runs) if a <= event["ts"] <= b), None)
        if run is None:
            continue
        name = _as_exported(event["name"].removesuffix(_END))
        about.setdefault(name, event["args"])
        seconds.setdefault(name, [0.0] * _RUNS)[run] += event["dur"] * 1e-6
    rows = [
        _row(name, seconds[name], about[name], _claim_of(about[name], order, claims), sizes)
        for name in seconds
    ]
    total = sum(row["seconds"] for row in rows) or 1.0
    for row in rows:
        row["share"] = row["seconds"] / total
    return sorted(rows, key=lambda row: -row["seconds"])


def _as_exported(name: str) -> str:
    """The name in the file of a product that onnxruntime fused with its activation or its bias."""
    return name.removeprefix("fused ").partition("/MatMulAddFusion")[0]


def _row(
    name: str,
    seconds: Sequence[float],
    args: Mapping[str, Any],
    claim: Mapping[str, Any] | None,
    sizes: Mapping[str, int],
) -> dict[str, Any]:
    middle = statistics.median(seconds)
    place = str(args.get("provider", ""))
    kernel = {"CPUExecutionProvider": "cpu", "CUDAExecutionProvider": "cuda"}.get(place, place)
    size, op = sizes.get(name, 0), str(args.get("op_name", ""))
    if place == sparse.NAME:
        kernel = "ours"
    if claim is not None:
        name, op, size = claim["node"], claim["op"], claim["bytes"]
        kernel = ", ".join(filter(None, ("ours", claim["format"], claim["type"])))
    return {
        "node": name,
        "op": op,
        "kernel": kernel,
        "seconds": middle,
        "weight_bytes": size,
        "gb_per_s": size / middle / 1e9 if size and middle > 0 else None,
    }


def _order(profiled: Any) -> list[dict[str, str]]:
    """Operators by name in each of our fused nodes, by their running number; empty where unknown.

    onnxruntime 1.23 does not tell: its rows keep the fused nodes' names and say no bytes.
    """
    if not hasattr(profiled, "get_provider_graph_assignment_info"):
        return []
    parts = profiled.get_provider_graph_assignment_info()
    mine = [part.get_nodes() for part in parts if part.ep_name == sparse.NAME]
    return [{node.name: node.op_type for node in nodes} for nodes in mine]


def _claim_of(
    args: Mapping[str, Any],
    order: Sequence[Mapping[str, str]],
    claims: Sequence[Mapping[str, Any]],
) -> Mapping[str, Any] | None:
    """What a fused node is, when its number and the widths of its outputs agree with claims.

    Nodes between products give outputs as wide as some product's inputs or outputs.
    """
    number = re.search(r"_(\d+)$", str(args.get("op_name", "")))
    if args.get("provider") != sparse.NAME or number is None or int(number[1]) >= len(order):
        return None
    inside = order[int(number[1])]
    for name, op in inside.items():
        if op == _ATTENTION:
            return {"node": name, "op": op, "format": "", "type": "", "bytes": 0}
    found = [c for c in claims if c["node"] in inside]
    shapes = [shape for each in args.get("output_type_shape", []) for shape in each.values()]
    widths = {shape[-1] for shape in shapes if shape}
    fits = {c["columns"] for c in found}
    fits |= {c["rows"] for c in found if c["op"] in _PRODUCTS}
    if not found or not widths or not widths <= fits:
        return None
    few = all(math.prod(shape[:-1]) <= _FEW for shape in shapes)
    read = [
        ("lanes", c["lane_bytes"]) if few and c["lane_bytes"] else (c["format"], c["bytes"])
        for c in found
    ]
    return {
        "node": " + ".join(c["node"] for c in found),
        "op": found[0]["op"],
        "format": "/".join(sorted({form for form, _ in read})),
        "type": "/".join(sorted({c["type"] for c in found} & set(_NARROW))),
        "bytes": sum(size for _, size in read),
    }


def _weight_bytes(file: ModelFile) -> dict[str, int]:
    """Bytes a product reads of its weight when it is not ours, by node: dense, as stored."""
    constants = Constants(load_checked(file), file.path.parent)
    found = {}
    for node in constants.graph.node:
        if node.op_type not in (*_PRODUCTS, "MatMulNBits") or len(node.input) < 2:
            continue
        # MatMulNBits has scales behind the whole numbers.
        last = 3 if node.op_type == "MatMulNBits" else 2
        routes = [constants.route(name) for name in node.input[1:last] if name]
        if routes and all(routes):
            found[node.name] = sum(_bytes(route.weight) for route in routes if route)
    return found


def _bytes(constant: Constant) -> int:
    bits = next(dtype.bits for dtype in DTYPES.values() if dtype.name == constant.dtype)
    return -(-constant.elements * bits // 8)
