"""What the sparse kernels gain on each matrix of a model, by running it with them and without."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from elsa_compile.runtime import kernels
from elsa_compile.runtime.errors import UserInputError
from elsa_compile.runtime.layers import profile
from elsa_compile.runtime.onnx_file import ModelFile
from elsa_compile.runtime.session import session

_CONTEXT = 32


@dataclass(frozen=True)
class MeasuredGain:
    """Speed with our kernels over that of the same file in stock onnxruntime.

    Attributes:
        workload: what was run.
        by_node: of each node that both runs name, products and others.
        all_nodes: of the sums over all nodes.
    """

    workload: str
    by_node: Mapping[str, float]
    all_nodes: float


def measure_gain(file: ModelFile, threads: int | None) -> MeasuredGain:
    """Profile a model node by node: a token after a context of 32, or one run of any other model.

    Args:
        file: the checked file.
        threads: as in `session`.

    Raises:
        UserInputError: the kernels are not there.
    """
    there, why = kernels.available()
    if not there:
        raise UserInputError(f"--measure: native kernels: {why}")
    seconds: list[dict[str, float]] = []
    name = ""
    for ours in (False, True):
        opened = session(file.path, threads, "cpu", checked=file, kernels=ours)
        tables = profile(opened, file, [_CONTEXT], [_CONTEXT])
        # Decoding is the last workload of a language model.
        name, rows = list(tables.items())[-1]
        seconds.append(_by_node(rows))
    stock, sparse = seconds
    gains: dict[str, float] = {}
    for node, spent in sparse.items():
        # Products of one input are one node of ours.
        members = [name for name in node.split(" + ") if name in stock]
        before = sum(stock[name] for name in members)
        if members and spent > 0:
            gains |= dict.fromkeys(members, before / spent)
    whole = sum(stock.values()) / (sum(sparse.values()) or 1.0)
    return MeasuredGain(name, gains, whole)


def _by_node(rows: list[dict[str, Any]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for row in rows:
        found[row["node"]] = found.get(row["node"], 0.0) + row["seconds"]
    return found
