"""The loop that data-driven one-shot passes share: observe a segment, change it, go on."""

from collections.abc import Callable, Collection
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from elsa_compile.calibration import iterate
from elsa_compile.data import graph_inputs
from elsa_compile.errors import UserInputError
from elsa_compile.pass_base import Context, Pass, PassStats
from elsa_compile.passes.masking import apply_mask, finish
from elsa_compile.program import Program, Weight, WeightPlan


class Statistics(Protocol):
    """What a pruner gathers about the inputs of a weight."""

    def add(self, rows: Tensor) -> None:
        """Take in rows (M, K) that the weight's product consumes."""


S = TypeVar("S", bound=Statistics)


def prune_layerwise(
    owner: Pass,
    program: Program,
    ctx: Context,
    samples: int,
    gather: Callable[[int, torch.device], S],
    prune: Callable[[Weight, WeightPlan, S], tuple[Tensor, Tensor]],
) -> PassStats:
    """Prune every planned weight with statistics of its inputs in the pruned model so far.

    Args:
        owner: the pass, for messages.
        program: its planned weights get new values and masks.
        ctx: samples, device, seed, progress.
        samples: calibration samples to use, at most.
        gather: (K, device) -> empty statistics.
        prune: (weight, plan, statistics) -> new values (N, K) and mask (N, K).

    Raises:
        UserInputError: no data, or inputs that are not finite.
    """
    plans = {weight.name: plan for weight, plan in program.planned()}

    def change(weight: Weight, seen: S) -> bool:
        plan = plans[weight.name]
        return apply_mask(weight, plan, *prune(weight, plan, seen))

    return finish(program, change_layerwise(owner, program, ctx, samples, plans, gather, change))


def change_layerwise(
    owner: Pass,
    program: Program,
    ctx: Context,
    samples: int,
    names: Collection[str],
    gather: Callable[[int, torch.device], S],
    change: Callable[[Weight, S], bool],
) -> PassStats:
    """Change the named weights in graph order, each with statistics of its inputs so far.

    Args:
        owner: see `prune_layerwise`, as all that is not named here.
        program: see there.
        ctx: see there.
        samples: see there.
        names: of the weights, linear layers and convolutions.
        gather: see there.
        change: (weight, statistics) -> whether it changed; writes the weight.
    """
    if ctx.samples is None:
        raise UserInputError(f"{owner.name} needs data; give some with --data")
    chosen = ctx.samples.take(samples, ctx.seed)
    inputs = [graph_inputs(program, row) for row in chosen.inputs]
    stats = PassStats(counts={"samples": len(inputs)})
    done: set[str] = set()
    with ctx.progress.stage(owner.name, len(names), "weights") as stage:
        for run, segment in iterate(program, list(names), inputs, ctx.device):
            waiting = [w for w in segment.weights if w.name not in done]
            seen: dict[str, S] = {}

            def observe(
                weights: tuple[Weight, ...], rows: Tensor, seen: dict[str, S] = seen
            ) -> None:
                if weights[0].name not in seen:
                    shared = gather(rows.shape[1], ctx.device)
                    seen.update((weight.name, shared) for weight in weights)
                seen[weights[0].name].add(rows)

            if waiting:
                run.observe(segment, observe)
            for weight in waiting:
                stats.changed += change(weight, seen[weight.name])
                done.add(weight.name)
                stage.advance(detail=weight.name)
    unseen = [name for name in names if name not in done]
    if unseen:
        raise UserInputError(
            f"{owner.name}: the data never reaches {unseen[0]} ({len(unseen)} weights in all); add "
            "them to ignore"
        )
    return stats
