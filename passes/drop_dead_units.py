"""drop-dead-units: neurons, heads and channels that contribute nothing leave the model."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from elsa_compile.channels import Ties, Units, find_ties, members, output_nodes, units
from elsa_compile.facts import Fact
from elsa_compile.pass_base import Context, Pass, PassStats, option, register_pass
from elsa_compile.passes.dead_units import Constants, Dead, find_dead, readers, stored_matrix
from elsa_compile.passes.module_sizes import sync_config, sync_module
from elsa_compile.passes.removal import (
    Undo,
    kept_entries,
    remove,
    select,
    select_inputs,
    set_data,
    shrunk_plan,
)
from elsa_compile.passes.same_outputs import difference, graph_outputs, random_inputs
from elsa_compile.program import Program


@register_pass
@dataclass(frozen=True, kw_only=True)
class DropDeadUnits(Pass):
    """Remove neurons, attention heads and channels whose removal changes no output.

    A unit is dead when all that read it have zeros there, or when it is zero itself; a constant
    moves into the bias of its reader. Query heads leave with their key and value head. The result
    is compared with the model before it; what would differ is left as it was and said.
    """

    name: ClassVar[str] = "drop-dead-units"
    preserves: ClassVar[frozenset[Fact]] = frozenset(Fact)

    neurons: bool = option(True, "remove neurons of MLPs")
    heads: bool = option(True, "remove attention heads; every layer must lose as many")
    channels: bool = option(True, "remove channels of convolutions")

    def run(self, program: Program, ctx: Context) -> PassStats:
        """Remove until nothing is dead: what read only dead units may be dead itself."""
        stats = PassStats(counts={"neurons": 0, "heads": 0, "channels": 0})
        before = program.parameters()
        refused: dict[str, None] = {}
        failed: set[str] = set()
        for kinds in (("neurons", "channels"), ("heads",)):
            chosen = [kind for kind in kinds if getattr(self, kind)]
            while chosen and self._round(program, chosen, stats, refused, failed):
                pass
        removed = before - program.parameters()
        stats.counts |= {"parameters": removed, "refused": len(refused)}
        stats.notes += [f"left in place: {reason}" for reason in refused]
        stats.changed = int(sum(stats.counts[k] for k in ("neurons", "heads", "channels")))
        return stats

    def _round(
        self,
        program: Program,
        kinds: list[str],
        stats: PassStats,
        refused: dict[str, None],
        failed: set[str],
    ) -> bool:
        """Remove what is dead now; True when something went."""
        found = find_ties(program)
        same = [group for group in units(found) if group.kind in kinds]
        groups = [group for group in same if group.name not in failed]
        dead, constants = find_dead(found, groups)
        for each in dead:
            refused.update(dict.fromkeys(each.refused))
        fixed = [group for group in same if group.kind == "heads" and group.pinned is not None]
        chosen = _allowed(found, dead, fixed, refused)
        if not any(bool(each.dead.any()) for each in chosen):
            return False
        problem = _try_removal(found, chosen, [g for g in same if g.pinned is None], constants)
        if problem is not None:
            failed.update(each.group.name for each in chosen)
            refused[f"{', '.join(kinds)}: {problem}"] = None
            return True
        for each in chosen:
            stats.counts[each.group.kind] += int(each.dead.sum())
        return True


def _allowed(
    found: Ties, dead: list[Dead], fixed: list[Units], refused: dict[str, None]
) -> list[Dead]:
    """What may go: one unit of each group stays, patterns hold, layers keep equal head counts."""
    for each in dead:
        if bool(each.dead.all()) and len(each.dead):
            each.dead[0] = False
            refused[f"{each.group.name}: all {each.group.count} units are dead, one stays"] = None
    for each in dead:
        if bool(each.dead.any()) and (why := _broken_pattern(found, each)) is not None:
            refused[f"{each.group.name}: {int(each.dead.sum())} dead {each.group.kind}, {why}"] = (
                None
            )
            each.dead[:] = False
    if found.program.kind == "decoder":
        _even_heads([each for each in dead if each.group.kind == "heads"], fixed, refused)
    return [each for each in dead if bool(each.dead.any())]


def _broken_pattern(found: Ties, each: Dead) -> str | None:
    kept = kept_entries([each.group], [each.dead])
    for member in members(found, each.group):
        plan = found.program.plans.get(member.weight)
        if plan is not None:
            result = shrunk_plan(found, found.program.weights[member.weight], plan, kept)
            if isinstance(result, str):
                return result
    return None


def _even_heads(dead: list[Dead], fixed: list[Units], refused: dict[str, None]) -> None:
    """Every layer loses as many heads as the one with the fewest dead ones.

    fixed: layers that cannot lose any.
    """
    counts = [each.group.count - int(each.dead.sum()) for each in dead]
    stay = max([*counts, *(group.count for group in fixed)], default=0)
    for each in dead:
        places = each.dead.nonzero().reshape(-1)
        surplus = len(places) - max(each.group.count - stay, 0)
        if surplus > 0:
            each.dead[places[len(places) - surplus :]] = False
            refused[
                f"{each.group.name}: {surplus} dead heads, since another layer keeps {stay} and "
                "the cache, config.json and genai_config.json know one count of heads"
            ] = None


# --- One removal, checked -----------------------------------------------------------------


def _try_removal(
    found: Ties, chosen: list[Dead], groups: list[Units], constants: Constants
) -> str | None:
    """Remove and compare; on a difference undo and say what it was."""
    program = found.program
    leaves = random_inputs(program)
    wanted = graph_outputs(program, leaves)
    kept = kept_entries([each.group for each in chosen], [each.dead for each in chosen])
    names = [node.name for node in output_nodes(_output(program))]
    wanted = [select(value, name, kept) for value, name in zip(wanted, names, strict=True)]
    undo: Undo = []
    try:
        fold_constants_(found, chosen, constants, undo)
        remove(found, kept, undo)
        sync_module(found, [each.group for each in chosen], kept, undo)
        sync_config(found, groups, kept, undo)
        problem = difference(program, select_inputs(program, leaves, kept), wanted)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        problem = f"the smaller model does not run: {str(error).splitlines()[0][:200]}"
    if problem is not None:
        for step in reversed(undo):
            step()
    return problem


def fold_constants_(found: Ties, chosen: list[Dead], constants: Constants, undo: Undo) -> None:
    """Add what the dead units give to the biases of their readers."""
    for each in chosen:
        for product in readers(found, each.group):
            value = constants.get(product.read)
            if value is None:
                continue
            labels = torch.from_numpy(each.group.labels[product.read])
            going = each.dead[labels] & ~torch.isnan(value) & (value != 0)
            if not bool(going.any()):
                continue
            matrix = stored_matrix(found, product)[:, going].double().sum(dim=2)
            if not bool((matrix != 0).any()):
                continue
            assert product.bias is not None
            bias = found.tensors[product.bias]
            given = (matrix @ value[going]).to(bias.dtype)
            set_data(bias, bias.data + given, undo)


def _output(program: Program) -> Any:
    return next(node for node in program.graph_module.graph.nodes if node.op == "output")
