"""How many bytes the exported file will take, from the plan alone.

Weights are counted as the encoder stores them, the smaller of dense and COO with varint indices,
with zeros spread evenly. The graph itself is estimated, so a file of under a few hundred KB may
come out some per cent off; measured on eight architectures in November 2026.
"""

import re
from collections.abc import Sequence

from elsa_compile.errors import UserInputError
from elsa_compile.passes.allocation import Pieces, pieces
from elsa_compile.program import Program, Weight, WeightPlan
from elsa_compile.sparse_encoding import MIN_SPARSE_BYTES

GRAPH_BYTES = 90  # in the file for each node of the traced graph; 75 ... 160 for decoders
_DENSE_HEADER_BYTES = 30  # beside the name
_COO_HEADER_BYTES = 50
_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_size(text: str, where: str) -> tuple[float, bool]:
    """A size as people write it: the number of bytes, or a share of the dense file and True.

    >>> parse_size("60MB", ""), parse_size("1.5 KiB", ""), parse_size("40%", "")
    ((60000000.0, False), (1536.0, False), (0.4, True))

    Raises:
        UserInputError: it is written otherwise, or is zero.
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([kmg]?i?b|%)", text.strip().lower())
    if match is None or (match[2] != "%" and match[2] not in _UNITS) or not float(match[1]):
        raise UserInputError(
            f"{where} is {text!r}, wanted bytes as in 60MB or 60MiB, or a share of the dense file "
            "as in 40%"
        )
    if match[2] == "%":
        return float(match[1]) / 100, True
    return float(match[1]) * _UNITS[match[2]], False


def size_text(count: float) -> str:
    """Bytes for people, decimal units.

    >>> size_text(61_234_567), size_text(900)
    ('61.2 MB', '900 B')
    """
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:.0f} B"


def index_bytes(size: int) -> float:
    """Mean length in bytes of a varint index into `size` elements, all equally likely.

    >>> index_bytes(256)  # half of 0 ... 255 take one byte, half two
    1.5
    """
    lengths = range(1, 11)
    within = [min(size, 1 << 7 * length) - min(size, 1 << 7 * (length - 1)) for length in lengths]
    within[0] += min(size, 1)  # index 0 takes a byte like 1 ... 127
    return sum(n * length for n, length in zip(within, lengths, strict=True)) / max(size, 1)


def stored_bytes(size: int, kept: float, value_bytes: int, name_length: int = 0) -> float:
    """Bytes of a weight of `size` entries, `kept` of them not zero, in its smallest form."""
    dense = size * value_bytes
    if dense < MIN_SPARSE_BYTES:
        return dense + _DENSE_HEADER_BYTES + name_length
    coo = kept * (value_bytes + index_bytes(size))
    return min(dense + _DENSE_HEADER_BYTES, coo + _COO_HEADER_BYTES) + name_length


def nonzeros(weight: Weight) -> int:
    """Entries of a weight that are not zero now; all of them where it has no values."""
    parameter = weight.parameter
    return parameter.numel() if parameter.is_meta else int(parameter.count_nonzero())


class FileSize:
    """Predicts the size of a program's exported file for any number of zeros in its weights."""

    def __init__(self, program: Program, plans: dict[str, WeightPlan], value_bytes: int) -> None:
        """Count what the plans do not change.

        Args:
            program: the model.
            plans: of the weights to prune.
            value_bytes: of a matrix entry in the file: 4, 2 for half precision, or 1 for int8,
                where each row has a scale.
        """
        self._value_bytes = value_bytes
        self._weights = [program.weights[name] for name in plans]
        self._parts = [pieces(plan) for plan in plans.values()]
        nodes = program.graph_module.graph.nodes
        self._rest = float(GRAPH_BYTES * sum(node.op == "call_function" for node in nodes))
        for weight in program.weights.values():
            if weight.name not in plans:
                self._rest += self._unplanned(weight)

    def _unplanned(self, weight: Weight) -> float:
        size = weight.parameter.numel()
        if weight.kind == "other":  # norms and biases stay dense and in float32
            return 4 * size + _DENSE_HEADER_BYTES + len(weight.name)
        found = stored_bytes(size, nonzeros(weight), self._value_bytes, len(weight.name))
        return found + self._scales(weight)

    def __call__(self, zeros: Sequence[int]) -> float:
        """Bytes of the file when so many pieces of each planned weight are zero."""
        return self._rest + sum(
            self._planned(weight, part, count)
            for weight, part, count in zip(self._weights, self._parts, zeros, strict=True)
        )

    def _planned(self, weight: Weight, part: Pieces, zeros: int) -> float:
        kept = (part.count - zeros) * part.size
        found = stored_bytes(part.entries, kept, self._value_bytes, len(weight.name))
        return found + self._scales(weight)

    def _scales(self, weight: Weight) -> float:
        if self._value_bytes > 1:
            return 0.0
        return 4 * weight.matrix_shape[0] + _DENSE_HEADER_BYTES + len(weight.name)
