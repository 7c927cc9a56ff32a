"""Move the units of a layer, or add some: what happens to every dimension that they run through.

A unit is an entry of several dimensions at once: a row of gate and of up, a column of down. A
change is a list of old entries for each dimension, as `removal.remove` takes it: in another order,
or with those of the last unit again and again.
"""

import numpy
import torch
from torch import Tensor

from elsa_compile.channels import Indices, Ties, Units, units
from elsa_compile.passes.module_sizes import sync_config, sync_module
from elsa_compile.passes.removal import Kept, Undo, remove, set_data
from elsa_compile.passes.same_outputs import difference, graph_outputs, random_inputs


def entries(labels: Indices, order: Indices) -> Indices:
    """The entry that comes to each place of a dimension.

    A unit's entries keep their order among each other: the first of a unit goes where the first of
    the one before it was.

    >>> entries(numpy.array([0, 1, 0, 1]), numpy.array([1, 0])).tolist()
    [1, 0, 3, 2]
    """
    place = numpy.argsort(labels, kind="stable").reshape(len(order), -1)
    result = numpy.empty(len(labels), dtype=numpy.int64)
    result[place] = place[order]
    return result


def reordered(group: Units, order: Tensor) -> Kept | None:
    """For each dimension the entries in their new order; None where units have unequal numbers."""
    kept: Kept = {}
    for key, labels in group.labels.items():
        counts = numpy.bincount(labels, minlength=group.count)
        if len(set(counts.tolist())) > 1:
            return None
        kept[key] = entries(labels, order.numpy())
    return kept


def grown(group: Units, count: int) -> Kept:
    """For each dimension its entries, those of the last unit again for each unit that is added.

    >>> group = Units("a", "neurons", 2, {("a", 0): numpy.array([0, 1, 0, 1])})
    >>> grown(group, 3)["a", 0].tolist()
    [0, 1, 1, 2, 3, 3]
    """
    kept: Kept = {}
    for key, labels in group.labels.items():
        own = numpy.flatnonzero(labels == group.count - 1)
        runs = numpy.split(own, numpy.flatnonzero(numpy.diff(own) > 1) + 1)
        parts, start = [], 0
        for run in runs:
            parts += [numpy.arange(start, run[-1] + 1), *[run] * (count - group.count)]
            start = int(run[-1]) + 1
        kept[key] = numpy.concatenate([*parts, numpy.arange(start, len(labels))])
    return kept


def apply_change(found: Ties, groups: list[Units], kept: Kept, added: bool) -> str | None:
    """Move or add entries and compare; on a difference undo and say what it was."""
    if not groups:
        return None
    program = found.program
    leaves = random_inputs(program)
    wanted = graph_outputs(program, leaves)
    undo: Undo = []
    try:
        remove(found, kept, undo)
        if added:
            _clear(found, kept, undo)
            sync_module(found, groups, kept, undo)
            free = [g for g in units(found) if g.pinned is None]
            sync_config(found, [g for g in free if g.kind == "neurons"], kept, undo)
        problem = difference(program, leaves, wanted)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        problem = f"the changed model does not run: {str(error).splitlines()[0][:200]}"
    if problem is not None:
        for step in reversed(undo):
            step()
    return problem


def _clear(found: Ties, kept: Kept, undo: Undo) -> None:
    """Zeros for the added entries of weights and biases."""
    own: set[str] = set()
    for product in found.products.values():
        own |= {product.weight} | ({product.bias} if product.bias is not None else set())
    for (name, dim), chosen in kept.items():
        again = numpy.ones(len(chosen), dtype=bool)
        again[numpy.unique(chosen, return_index=True)[1]] = False
        if name in own and again.any():
            places = torch.from_numpy(numpy.flatnonzero(again))
            tensor = found.tensors[name]
            set_data(tensor, tensor.data.index_fill(dim, places, 0.0), undo)
