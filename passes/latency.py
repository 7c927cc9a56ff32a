"""Decoding speed from the plan alone: seconds a token for any number of zeros in the weights."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from elsa_compile.errors import UserInputError
from elsa_compile.pass_base import Context
from elsa_compile.passes.allocation import pieces
from elsa_compile.passes.file_size import nonzeros
from elsa_compile.program import Program, Weight, WeightPlan
from elsa_compile.runtime.calibrate import KernelTable
from elsa_compile.runtime.decode_cost import DecodeCost

# Of everything that is no product, for each product: SmolLM2-135M at context 128 on one core of a
# Zen 4. Only --dry-run, which has no weights to measure with, takes it.
OTHER_S_A_PRODUCT = 19e-6


def parse_speedup(value: str | float, where: str) -> float:
    """A speed-up as people write it.

    >>> parse_speedup("2.5x", ""), parse_speedup(2, "")
    (2.5, 2.0)

    Raises:
        UserInputError: it is written otherwise, or is no speed-up.
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*x?", str(value).strip().lower())
    if match is None or not 1 <= float(match[1]) <= 1000:
        raise UserInputError(
            f"{where} is {value!r}, wanted a speed-up of decoding over the dense float32 model in "
            "onnxruntime, as in 2.5x"
        )
    return float(match[1])


def decode_cost(
    program: Program, ctx: Context, table: KernelTable, context: int, threads: int | None
) -> DecodeCost:
    """What a token costs now: measured where the context can, else estimated from the table."""
    if ctx.measure_decode is not None:
        return ctx.measure_decode(program, context, threads)
    found = [w for w in program.weights.values() if w.kind == "linear" or w.is_head]
    other = OTHER_S_A_PRODUCT * len(found)
    seconds = other + sum(table.dense_seconds(*w.matrix_shape) for w in found)
    names = tuple(w.name for w in found)
    return DecodeCost(context, threads, seconds, other, other, names, measured=False)


class DecodeLatency:
    """Predicts the seconds of one token for any number of zeros in the planned weights.

    The time of all products is as measured, divided among them as the kernel table has it. A weight
    that the execution provider takes costs its part over the gain that the table says for its size,
    density and type; any other costs its part as a dense one. What is no product costs what it did.
    """

    def __init__(
        self,
        program: Program,
        plans: Mapping[str, WeightPlan],
        table: KernelTable,
        cost: DecodeCost,
        dtype: str,
    ) -> None:
        """Count what the plans do not change.

        Args:
            program: the model.
            plans: of the weights to prune.
            table: of this machine.
            cost: of the dense model.
            dtype: "float32", "bfloat16" or "int8" of all weights, those that stay dense included.

        Raises:
            UserInputError: a planned weight was not seen among the model's products.
        """
        self._table, self._cost, self._dtype = table, cost, dtype
        uses = Counter(cost.products)
        unseen = [name for name in plans if name not in uses]
        if unseen:
            raise UserInputError(
                f"latency: {unseen[0]} is in no product of the exported model, so its time is not "
                "known; add it to ignore"
            )
        known = {name: program.weights[name] for name in uses if name in program.weights}
        dense = {n: uses[n] * table.dense_seconds(*w.matrix_shape) for n, w in known.items()}
        scale = cost.products_s / max(sum(dense.values()), 1e-12)
        self._scale = {name: count * scale for name, count in uses.items()}
        self._weights = [known[name] for name in plans]
        self._parts = [pieces(plan) for plan in plans.values()]
        rest = [weight for name, weight in known.items() if name not in plans]
        self.unplanned_s = sum(self._seconds(weight, nonzeros(weight)) for weight in rest)
        self.largest = max(rest, key=lambda w: w.parameter.numel()).name if rest else None

    @property
    def other_s(self) -> float:
        """Of what is no product, with our kernels."""
        return self._cost.sparse_other_s

    @property
    def dense_s(self) -> float:
        """Of the dense float32 model."""
        return self._cost.seconds

    def __call__(self, zeros: Sequence[int]) -> float:
        """Seconds of a token when so many pieces of each planned weight are zero."""
        planned = sum(
            self._seconds(weight, (part.count - count) * part.size)
            for weight, part, count in zip(self._weights, self._parts, zeros, strict=True)
        )
        return self.other_s + self.unplanned_s + planned

    def speedup(self, zeros: Sequence[int]) -> float:
        """Over the dense float32 model."""
        return self.dense_s / self(zeros)

    def _seconds(self, weight: Weight, kept: int) -> float:
        rows, columns = weight.matrix_shape
        own = self._table.seconds_of(rows, columns, kept, self._dtype)
        return self._scale[weight.name] * own

    def prediction(self, zeros: Sequence[int]) -> dict[str, float]:
        """For the report, where `elsa-run bench` finds it; threads 0 stands for all cores."""
        return {
            "predicted_decode_speedup": self.speedup(zeros),
            "predicted_decode_s": self(zeros),
            "dense_decode_s": self.dense_s,
            "other_decode_s": self.other_s,
            "decode_context": self._cost.context,
            "decode_threads": self._cost.threads or 0,
        }

    def sentence(self, zeros: Sequence[int]) -> str:
        """The prediction in words."""
        how = "measured" if self._cost.measured else "estimated, nothing was run"
        return (
            f"decoding at {self._cost.context} tokens is predicted to take "
            f"{self(zeros) * 1e3:.2f} ms, {self.speedup(zeros):.2f}x as fast as the dense model's "
            f"{self.dense_s * 1e3:.2f} ms ({how}); {self.other_s * 1e3:.2f} ms of it no weight"
            f" takes part in, {self.unplanned_s * 1e3:.2f} ms go to weights that are not pruned"
        )

    def bounds(self, zeros: Sequence[int]) -> str:
        """What keeps decoding from being faster, in words."""
        said = f", the largest {self.largest}" if self.largest else ""
        return (
            f"decoding is predicted to be {self.speedup(zeros):.2f}x as fast, "
            f"{self(zeros) * 1e3:.2f} ms a token: {self.other_s * 1e3:.2f} ms are no products of "
            f"weights (attention, norms, the call), and {self.unplanned_s * 1e3:.2f} ms go to "
            f"weights that are not pruned{said}"
        )
