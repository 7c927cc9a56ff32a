"""Facts about a Program, and one checker for each.

A fact is what later passes may rely on. The pipeline runs the checker of every held fact again
after each pass, so "a later pass woke up a pruned zero" is a caught error with a name on it.
"""

from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING

import torch
from torch import fx

from elsa_compile.errors import ElsaError

if TYPE_CHECKING:
    from elsa_compile.program import Program


class Fact(Enum):
    """What can hold for a Program."""

    SHAPES = "every weight has the shape the graph was traced with"
    PLANNED = "every prunable weight has a plan that fits its shape"
    MASKED = "every entry outside a mask is exactly zero, and each mask follows its pattern"
    QUANTIZED = "every quantised weight lies on its grid, and zero maps to zero"
    EXPORTABLE = "the graph is well-formed and consists of ATen operators only"


class FactError(ElsaError):
    """A fact that should hold does not. Names the weight or node."""


def check(program: "Program", fact: Fact) -> None:
    """Raise FactError unless `fact` holds for `program`."""
    CHECKERS[fact](program)


def _check_shapes(program: "Program") -> None:
    by_attribute = {weight.attribute: weight for weight in program.weights.values()}
    for node in program.graph_module.graph.nodes:
        weight = by_attribute.get(str(node.target)) if node.op == "get_attr" else None
        traced = node.meta.get("val")
        if weight is None or traced is None:
            continue
        if tuple(traced.shape) != tuple(weight.parameter.shape):
            raise FactError(
                f"{weight.name} has shape {list(weight.parameter.shape)}, but the graph was "
                f"traced with {list(traced.shape)}"
            )


def _check_planned(program: "Program") -> None:
    for name, weight in program.prunable.items():
        plan = program.plans.get(name)
        if plan is None:
            raise FactError(f"{name} is prunable but has no plan")
        if plan.shape != weight.matrix_shape:
            raise FactError(f"{name} is planned as {plan.shape}, but is {weight.matrix_shape}")
        if plan.skipped is not None:
            continue
        if not 0.0 <= plan.sparsity < 1.0:
            raise FactError(f"{name} is planned with sparsity {plan.sparsity}, outside [0, 1)")
        problem = plan.pattern.problem(plan.shape)
        if problem is not None:
            raise FactError(f"{name} {problem}")


def _check_masked(program: "Program") -> None:
    for weight, plan in program.planned():
        if plan.mask is None:
            raise FactError(f"{weight.name} is planned at {plan.sparsity:g} but has no mask")
        matrix = weight.matrix()
        awake = int(((matrix != 0) & ~plan.mask.to(matrix.device)).sum())
        if awake:
            raise FactError(f"{weight.name} has {awake} non-zero entries outside its mask")
        violation = plan.pattern.violation(plan.mask, plan.sparsity)
        if violation is not None:
            raise FactError(f"{weight.name}: {violation}")


def _check_quantized(program: "Program") -> None:
    for name, plan in program.plans.items():
        if plan.grid is None:
            continue
        matrix, scale = program.weights[name].matrix(), plan.grid.scale
        rows, columns = matrix.shape
        if scale.shape[0] != rows or scale.shape[1] < 1 or columns % scale.shape[1]:
            raise FactError(f"{name} is {rows} x {columns}, but its scales are {list(scale.shape)}")
        if not bool(((scale > 0) & torch.isfinite(scale)).all()):
            raise FactError(f"{name} has a quantisation scale that is not positive and finite")
        scale = scale.to(matrix.device)[:, :, None]
        grouped = matrix.reshape(rows, scale.shape[1], -1)
        steps = (grouped / scale).round()
        largest = float(steps.abs().max()) if steps.numel() else 0.0
        if largest > plan.grid.limit:
            raise FactError(f"{name} holds {largest:g} steps, its int{plan.grid.bits} grid has "
                            f"{plan.grid.limit}")  # fmt: skip
        # Exactly, since the file holds the whole numbers and the scales.
        off_grid = int((steps * scale != grouped).sum())
        if off_grid:
            raise FactError(f"{name} has {off_grid} entries off its int{plan.grid.bits} grid")


def _check_exportable(program: "Program") -> None:
    graph = program.graph_module.graph
    try:
        graph.lint()
    except (RuntimeError, ValueError) as error:
        raise FactError(f"the graph is malformed: {error}") from error
    for node in graph.nodes:
        if node.op == "call_module":
            raise FactError(f"node {node.name} calls module {node.target}; ATen operators only")
        if node.op == "get_attr" and not _has_attribute(program.graph_module, str(node.target)):
            raise FactError(f"node {node.name} refers to the missing weight {node.target}")


def _has_attribute(module: fx.GraphModule, target: str) -> bool:
    owner: object = module
    for part in target.split("."):
        if not hasattr(owner, part):
            return False
        owner = getattr(owner, part)
    return isinstance(owner, (torch.Tensor, torch.nn.Module)) or owner is not None


CHECKERS: dict[Fact, Callable[["Program"], None]] = {
    Fact.SHAPES: _check_shapes,
    Fact.PLANNED: _check_planned,
    Fact.MASKED: _check_masked,
    Fact.QUANTIZED: _check_quantized,
    Fact.EXPORTABLE: _check_exportable,
}
