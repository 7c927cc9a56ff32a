"""Does a changed program still compute what it did? Outputs of graph and module, compared."""

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from elsa_compile.passes.module_sizes import module_outputs
from elsa_compile.program import Program

# Terms are summed in another order, or fewer: float32 differs by about 1e-6 of the largest output.
TOLERANCE = 1e-4


def random_inputs(program: Program) -> list[Any]:
    """The example inputs, flat, with random numbers where they are floats."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(leaf.shape, generator=generator).to(leaf.dtype)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
        else leaf
        for leaf in pytree.tree_leaves(program.signature.args)
    ]


def graph_outputs(program: Program, leaves: list[Any]) -> list[Tensor]:
    """The traced graph's outputs for flat inputs."""
    return _flat(program.run(*_nested(program, leaves)))


def difference(program: Program, leaves: list[Any], wanted: list[Tensor]) -> str | None:
    """What the graph or the module computes differently, or None.

    Args:
        program: as it is now.
        leaves: flat inputs.
        wanted: the outputs before the change.
    """
    args = _nested(program, leaves)
    views = {"graph": program.run(*args), "module": module_outputs(program, args)}
    for view, outputs in views.items():
        if outputs is None:
            continue
        for name, one, other in zip(
            program.signature.output_names, _flat(outputs), wanted, strict=True
        ):
            if one.shape != other.shape:
                return f"the {view} gives {name} {list(one.shape)}, wanted {list(other.shape)}"
            scale = max(1.0, float(other.abs().max())) if other.numel() else 1.0
            gap = float((one - other).abs().max()) / scale if other.numel() else 0.0
            if not gap <= TOLERANCE:
                return f"the {view} computes another {name}: {gap:.1e} apart"
    return None


def _nested(program: Program, leaves: list[Any]) -> Any:
    _, spec = pytree.tree_flatten(program.signature.args)
    return pytree.tree_unflatten(leaves, spec)


def _flat(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
