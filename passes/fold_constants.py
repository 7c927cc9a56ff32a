"""fold-constants: what depends on no input is computed now."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from elsa_compile.facts import Fact
from elsa_compile.pass_base import Context, Pass, PassStats, option, register_pass
from elsa_compile.program import Program


@register_pass
@dataclass(frozen=True, kw_only=True)
class FoldConstants(Pass):
    """Compute what depends on no input and drop what nobody reads.

    Weights (parameters) are left as they are: they keep their names, layout and zeros.
    """

    name: ClassVar[str] = "fold-constants"
    preserves: ClassVar[frozenset[Fact]] = frozenset(Fact)

    limit_kib: int = option(1024, "largest folded tensor in KiB; larger ones stay computed", low=0)

    def run(self, program: Program, ctx: Context) -> PassStats:
        """Fold in graph order, then remove dead nodes."""
        owner, graph = program.graph_module, program.graph_module.graph
        before = len(graph.nodes)
        known: dict[fx.Node, Tensor] = {}
        folded = 0
        for node in list(graph.nodes):
            if node.op == "get_attr":
                value = _attribute(owner, str(node.target))
                if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                    known[node] = value
                continue
            result = _evaluate(node, known)
            if result is None or result.numel() * result.element_size() > self.limit_kib * 1024:
                continue
            known[node] = result
            if any(user not in known and user.op != "output" for user in node.users):
                folded += _replace(owner, node, result, folded)
        # Assertions on sizes are call_functions without users: eliminate_dead_code keeps them.
        graph.eliminate_dead_code()
        owner.delete_all_unused_submodules()
        graph.lint()
        owner.recompile()
        removed = before - len(graph.nodes)
        return PassStats(changed=folded + max(removed, 0), counts={"folded": folded})


def _attribute(owner: Any, target: str) -> Any:
    for part in target.split("."):
        owner = getattr(owner, part)
    return owner


def _evaluate(node: fx.Node, known: dict[fx.Node, Tensor]) -> Tensor | None:
    """The node's value when all it reads is known, else None."""
    if node.op != "call_function" or not node.all_input_nodes:
        return None
    if any(source not in known for source in node.all_input_nodes) or node.is_impure():
        return None
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        return None
    args = fx.node.map_arg(node.args, lambda n: known[n])
    kwargs = fx.node.map_arg(node.kwargs, lambda n: known[n])
    assert callable(node.target)
    with torch.no_grad():
        value = node.target(*args, **kwargs)
    return value if isinstance(value, Tensor) else None


def _replace(owner: fx.GraphModule, node: fx.Node, value: Tensor, number: int) -> int:
    """Put a buffer in the node's place; returns 1."""
    name = f"folded_{number}"
    while hasattr(owner, name):
        name += "_"
    owner.register_buffer(name, value.detach().clone().contiguous())
    with owner.graph.inserting_before(node):
        constant = owner.graph.get_attr(name)
    constant.meta = dict(node.meta)
    for user in list(node.users):
        user.replace_input_with(node, constant)
    return 1
