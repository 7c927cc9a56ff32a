"""Single passes on a model of one's own, without a recipe and without an export."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from elsa_compile import data as data_module
from elsa_compile import decode_cost, pipeline
from elsa_compile.frontend import from_module
from elsa_compile.pass_base import Context, Pass
from elsa_compile.program import Program
from elsa_compile.progress import open_progress
from elsa_compile.training_data import training_data


def apply(
    model: nn.Module | Program,
    *passes: Pass,
    data: Iterable[Any] | None = None,
    example_inputs: tuple[torch.Tensor, ...] | None = None,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> Program:
    """Run passes on a model in place.

        import elsa_compile
        from elsa_compile.passes import AllocateUniform, PruneMagnitude
        elsa_compile.apply(model, AllocateUniform(sparsity=0.8), PruneMagnitude())

    Args:
        model: any nn.Module; its parameters are changed. Or a Program from an earlier call.
        passes: in order; the order is checked first.
        data: batches for passes that need them: tensors, tuples or dicts of tensors.
        example_inputs: for tracing; language models and encoders of transformers need none.
        device: where heavy arithmetic runs.
        seed: of every random choice.

    Returns:
        The program: its `plans` hold masks and errors, its `history` what was done.

    Raises:
        ElsaError: wrong order, missing data, a model that cannot be traced, a fact that fails.
    """
    program = model if isinstance(model, Program) else from_module(model, example_inputs)
    batches = None if data is None else list(data)
    samples = None if batches is None else data_module.python_samples(program, batches)
    stream = training_data(program, batches, samples)
    quiet = open_progress("silent")
    ctx = Context(
        samples, torch.device(device), seed, quiet, stream, measure_decode=decode_cost.measure
    )
    pipeline.run(program, passes, ctx)
    return program
