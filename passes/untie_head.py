"""untie-head: an output head that is the embedding becomes a matrix of its own."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import fx, nn

from elsa_compile.channel_layout import op_name
from elsa_compile.channel_rules import UNCHANGED
from elsa_compile.channels import attribute
from elsa_compile.facts import Fact
from elsa_compile.pass_base import Context, Pass, PassStats, register_pass
from elsa_compile.passes.allocation import HEAD
from elsa_compile.program import Program, Weight, WeightPlan


@register_pass
@dataclass(frozen=True, kw_only=True)
class UntieHead(Pass):
    """Give the output head a copy of the embedding it is tied to, to prune or quantise it apart.

    The copy costs as many bytes as the embedding; put the pass before the one that treats the head
    differently, and leave it out where none does.
    """

    name: ClassVar[str] = "untie-head"
    preserves: ClassVar[frozenset[Fact]] = frozenset(Fact) - {Fact.QUANTIZED}

    def run(self, program: Program, ctx: Context) -> PassStats:
        """Split the tied weight in the graph, the module and the configuration."""
        tied = [w for w in program.weights.values() if w.kind == "embedding" and w.is_head]
        if not tied:
            return PassStats(notes=["no head is tied to an embedding"])
        weight = tied[0]
        head = _head_name(program, weight)
        if head is None:
            return PassStats(
                notes=[f"left {weight.name} tied: the model has no second name for it"]
            )
        prefix = weight.attribute.removesuffix(weight.name)
        parameter = nn.Parameter(weight.parameter.detach().clone())
        parameter.requires_grad_(weight.parameter.requires_grad)
        _split_graph(program, weight, f"{prefix}{head}", parameter)
        _set(program.module, head, parameter)
        _record(program, weight, head, parameter)
        known = program.config or {}
        for config in (known, known.get("text_config")):
            if isinstance(config, dict) and "tie_word_embeddings" in config:
                config["tie_word_embeddings"] = False
        if hasattr(getattr(program.module, "config", None), "tie_word_embeddings"):
            program.module.config.tie_word_embeddings = False  # type: ignore[union-attr]
        size = parameter.numel() * parameter.element_size()
        note = (
            f"{head} is a copy of {weight.name}: {size / 2**20:.1f} MiB more while both are dense"
        )
        return PassStats(changed=1, counts={"bytes": size}, notes=[note])


def _head_name(program: Program, weight: Weight) -> str | None:
    """The name by which the head goes: that of a module which is no lookup table."""
    names = [weight.name, *weight.aliases]
    if program.module is None:
        return weight.aliases[-1] if weight.aliases else None
    owners = {name: program.module.get_submodule(name.rpartition(".")[0]) for name in names}
    tables = [name for name, owner in owners.items() if isinstance(owner, nn.Embedding)]
    others = [name for name in names if name not in tables]
    return others[0] if others and tables else None


def _set(owner: Any, target: str, parameter: nn.Parameter) -> None:
    """`owner.a.b.weight = parameter` for the target "a.b.weight"; nothing without an owner."""
    if owner is not None:
        parent, _, last = target.rpartition(".")
        setattr(attribute(owner, parent) if parent else owner, last, parameter)


def _split_graph(program: Program, weight: Weight, target: str, parameter: nn.Parameter) -> None:
    """Lookups read the old parameter by its own name, everything else the new one."""
    module, graph = program.graph_module, program.graph_module.graph
    readers: list[tuple[fx.Node, fx.Node]] = []
    for node in graph.nodes:
        if node.op == "get_attr" and attribute(module, str(node.target)) is weight.parameter:
            readers += [(user, node) for user in node.users]
    table = next(
        (name for name in (weight.attribute, *_targets(program, weight)) if name != target), ""
    )
    _set(module, target, parameter)
    anchor = next(node for node in graph.nodes if node.op != "get_attr")
    with graph.inserting_before(anchor):
        holders = {name: graph.get_attr(name) for name in (table, target)}
    for user, node in readers:
        holder = holders[table if _looks_up(user, node) else target]
        holder.meta = dict(node.meta)
        user.replace_input_with(node, holder)
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users and str(node.target) in holders:
            graph.erase_node(node)
    graph.lint()
    module.recompile()
    weight.attribute = table


def _targets(program: Program, weight: Weight) -> list[str]:
    named = program.graph_module.named_parameters(remove_duplicate=False)
    return [name for name, parameter in named if parameter is weight.parameter]


def _looks_up(user: fx.Node, node: fx.Node) -> bool:
    """True when a reader of the weight is an embedding, perhaps behind a cast."""
    if op_name(user) in UNCHANGED:
        return any(_looks_up(after, user) for after in user.users)
    return op_name(user) == "embedding" and user.args[0] is node


def _record(program: Program, weight: Weight, head: str, parameter: nn.Parameter) -> None:
    """Two weights instead of one; the head keeps being left dense unless it is named."""
    names = [name for name in (weight.name, *weight.aliases) if name != head]
    prefix = weight.attribute.removesuffix(names[0])
    table = replace(weight, name=names[0], aliases=tuple(names[1:]), is_head=False)
    own = Weight(head, f"{prefix}{head}", parameter, "linear", is_head=True, type_name="Linear")
    items = [
        (table.name, table) if old is weight else (n, old) for n, old in program.weights.items()
    ]
    program.weights.clear()
    program.weights.update([*items, (head, own)])
    if program.plans:
        program.plans.pop(head, None)
        program.plans[head] = WeightPlan(own.matrix_shape, skipped=HEAD)
