"""What int8 activations do to a program, simulated in torch.

Our kernels multiply int8 weights with activations rounded to int8, one scale a token (a row of the
product). `Int8Activations` rounds the same way whatever torch multiplies with a quantised weight:

    before  y = x Wq^T            after  y = (s round(x / s)) Wq^T,  s = max |x| / 127 of each token

onnxruntime's own products have a scale for some 32 entries of a token and lose less.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from elsa_compile.program import Program

LIMIT = 127


def round_tokens(values: Tensor) -> Tensor:
    """Values on a symmetric int8 grid of its own for each row.

    Args:
        values: (..., K) float.

    Returns:
        The same shape; a row of zeros stays so.

    >>> round_tokens(torch.tensor([[127.0, 0.6], [0.0, 0.0]])).tolist()
    [[127.0, 1.0], [0.0, 0.0]]
    """
    largest = values.abs().amax(dim=-1, keepdim=True)
    inverse = torch.where(largest > 0, LIMIT / largest, 0.0)
    return (values * inverse).round() * (largest / LIMIT)


class Int8Activations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, products with a program's quantised weights see rounded activations.

    Example:
        with Int8Activations(program):
            worse = data.perplexity(program, windows)

    Lookups and convolutions stay exact: the kernels have none of their own.
    """

    def __init__(self, program: Program) -> None:
        """program: its weights on grids are those whose products are rounded."""
        super().__init__()  # type: ignore[no-untyped-call]
        grids = program.grids()
        self.products = 0
        self._weights = {
            weight.parameter.untyped_storage().data_ptr()
            for name, weight in program.weights.items()
            if name in grids and weight.kind != "conv"
        }

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Round the activation of each product with a quantised weight."""
        place = _ACTIVATIONS.get(func)
        if place is not None and self._is_quantised(args[place + 1]):
            self.products += 1
            args = [*args[:place], round_tokens(args[place]), *args[place + 1 :]]
        return func(*args, **(kwargs or {}))

    def _is_quantised(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.untyped_storage().data_ptr() in self._weights


_aten = torch.ops.aten
# Operator -> place of the activation; the weight follows it.
_ACTIVATIONS = {
    _aten.mm.default: 0,
    _aten.addmm.default: 1,
    _aten.linear.default: 0,
    _aten.matmul.default: 0,
}
