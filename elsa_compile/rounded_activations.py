"""What rounded activations do to a program, simulated in torch.

Products of quantised weights are sums of integers where activations are integers too. Two ways:

    int8 weights, a scale a row    our kernels: one scale a token, as many levels as leave every sum
                                   within 32 bits, 32767 at most
    all others                     onnxruntime: int8, a scale for each group of the weight, or for
                                   32 entries

`RoundedActivations` rounds so whatever torch multiplies with a quantised weight.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from elsa_compile.program import Grid, Program, Weight

_INT8 = 127
_MOST = 32767  # levels of our kernels
_BLOCK = 32  # entries that share a scale in onnxruntime's products


def round_rows(values: Tensor, levels: int) -> Tensor:
    """Values on a symmetric grid of its own for each row.

    Args:
        values: (..., K) float.
        levels: the largest whole number.

    Returns:
        The same shape; a row of zeros stays so.

    >>> round_rows(torch.tensor([[127.0, 0.6], [0.0, 0.0]]), 127).tolist()
    [[127.0, 1.0], [0.0, 0.0]]
    """
    largest = values.abs().amax(dim=-1, keepdim=True)
    inverse = torch.where(largest > 0, levels / largest, 0.0)
    return (values * inverse).round() * (largest / levels)


def round_blocks(values: Tensor, block: int) -> Tensor:
    """The same in int8 for each `block` entries of a row; the last block may be shorter."""
    width = values.shape[-1]
    padded = torch.nn.functional.pad(values, (0, -width % block))
    rounded = round_rows(padded.reshape(*values.shape[:-1], -1, block), _INT8)
    return rounded.flatten(-2)[..., :width]


def levels_of(weight: Weight, grid: Grid) -> int:
    """Most levels of an activation with which no sum of products leaves 32 bits."""
    whole = (weight.matrix() / grid.scale.to(weight.parameter.device)).round()
    largest = int(whole.abs().sum(dim=1, dtype=torch.float64).max())
    return min(_MOST, (2**31 - 1) // max(largest, 1))


class RoundedActivations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, products with a program's quantised weights see rounded activations.

    Example:
        with RoundedActivations(program):
            worse = data.perplexity(program, windows)

    Lookups and convolutions stay exact: they are widened.

    Attributes:
        products: how many were rounded.
    """

    def __init__(self, program: Program) -> None:
        """program: its weights on grids are those whose products are rounded."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.products = 0
        self._ways: dict[int, tuple[str, int]] = {}  # storage of a weight -> how to round
        for name, grid in program.grids().items():
            weight = program.weights[name]
            if weight.kind == "conv":
                continue
            way = ("rows", levels_of(weight, grid))
            if grid.bits != 8 or grid.scale.shape[1] > 1:
                way = ("blocks", grid.group_size(weight.matrix_shape[1]) or _BLOCK)
            self._ways[weight.parameter.untyped_storage().data_ptr()] = way

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Round the activation of each product with a quantised weight."""
        place = _ACTIVATIONS.get(func)
        if place is not None and isinstance(args[place + 1], Tensor):
            way = self._ways.get(args[place + 1].untyped_storage().data_ptr())
            if way is not None:
                self.products += 1
                change = round_rows if way[0] == "rows" else round_blocks
                args = [*args[:place], change(args[place], way[1]), *args[place + 1 :]]
        return func(*args, **(kwargs or {}))


_aten = torch.ops.aten
# Operator -> place of the activation; the weight follows it.
_ACTIVATIONS = {
    _aten.mm.default: 0,
    _aten.addmm.default: 1,
    _aten.linear.default: 0,
    _aten.matmul.default: 0,
}
