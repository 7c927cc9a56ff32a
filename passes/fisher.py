"""The diagonal empirical Fisher information of weights: the mean of squared gradients.

What a loss is depends on the model:

    next-token  cross-entropy of a language model on the calibration text
    labels      cross-entropy against labels drawn from the model's own class scores (B, C):
                the Fisher information itself, estimated with one draw a row
    outputs     anything else: the outputs are taken as means of Gaussians of unit variance, whose
                Fisher information is the mean of squared gradients of <noise, outputs>
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.utils import _pytree as pytree

from elsa_compile.data import Samples, graph_inputs, is_language_model
from elsa_compile.errors import ElsaError, UserInputError
from elsa_compile.pass_base import Context, Pass
from elsa_compile.program import Program, Weight

LOSSES = ("auto", "next-token", "labels", "outputs")


def next_token_loss(scores: Tensor, ids: Tensor) -> Tensor:
    """Mean cross-entropy of ids[:, 1:] under scores[:, :-1]; scores: (B, S, V), ids: (B, S)."""
    return cross_entropy(scores[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def sampled_label_loss(scores: Tensor, generator: torch.Generator) -> Tensor:
    """Mean cross-entropy of scores (B, C) against labels drawn from softmax(scores)."""
    chances = scores.detach().float().softmax(dim=1).cpu()
    labels = torch.multinomial(chances, 1, generator=generator)[:, 0]
    return cross_entropy(scores.float(), labels.to(scores.device))


def noise_loss(outputs: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """<noise, outputs> over all floating outputs, noise standard normal."""
    parts = [
        (torch.randn(value.shape, generator=generator).to(value.device) * value.float()).sum()
        for value in outputs
        if value.is_floating_point() and value.requires_grad
    ]
    return torch.stack(parts).sum()


def squared_gradients(
    owner: Pass,
    program: Program,
    weights: Sequence[Weight],
    samples: Samples,
    ctx: Context,
    loss: str = "auto",
) -> dict[str, Tensor]:
    """Mean over samples of each weight's squared gradient, (N, K) float32, by name.

    The model runs on stand-ins of its weights that share their memory on the CPU, so neither
    `requires_grad` nor `grad` of any Parameter changes. A gradient is squared and freed as soon as
    it is complete: memory is one float32 tensor a weight, and the activations of one sample.

    Args:
        owner: the pass, for messages.
        program: run through its module if it is a decoder with one, else through the traced graph,
            which stays on the device it was traced on.
        weights: the weights wanted.
        samples: one gradient each.
        ctx: device, seed, progress.
        loss: one of LOSSES.

    Raises:
        UserInputError: a loss that does not fit the model.
        ElsaError: gradients that are not finite.
    """
    module = program.module if program.kind == "decoder" else None
    model: nn.Module = program.graph_module if module is None else module
    device = torch.device("cpu") if module is None else ctx.device
    generator = ctx.generator()
    with _at_rest(module), ctx.progress.stage(owner.name, len(samples.inputs), "samples") as stage:
        totals = {w.name: torch.zeros(w.parameter.shape, device=device) for w in weights}
        stand_ins = _stand_ins(model, weights, totals, device)
        for row in samples.inputs:
            outputs = _outputs(program, model, stand_ins, row, device)
            value = _loss(owner, program, loss, outputs, row, generator)
            value.backward()  # type: ignore[no-untyped-call]
            stage.advance()
    for weight in weights:
        if not bool(torch.isfinite(totals[weight.name]).all()):
            raise ElsaError(
                f"{owner.name}: the gradient of {weight.name} is not finite; check the data"
            )
    return {w.name: _as_matrix(w, totals[w.name] / len(samples.inputs)) for w in weights}


def _as_matrix(weight: Weight, stored: Tensor) -> Tensor:
    return stored.t() if weight.transposed else stored.reshape(stored.shape[0], -1)


@contextmanager
def _at_rest(module: nn.Module | None) -> Iterator[None]:
    """Gradients on, whatever the caller's mode; no dropout; modes as they were afterwards."""
    training = [] if module is None else [m for m in module.modules() if m.training]
    for member in training:
        member.training = False
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for member in training:
            member.training = True


def _stand_ins(
    model: nn.Module, weights: Sequence[Weight], totals: dict[str, Tensor], device: torch.device
) -> dict[str, Tensor]:
    """Tensors to run the model with: leaves for `weights`, plain ones for everything else.

    Tied weights come under all their names, as one tensor.
    """
    names = {id(weight.parameter): weight.name for weight in weights}
    leaves: dict[str, Tensor] = {}
    found: dict[str, Tensor] = {}
    held = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in held:
        wanted = names.get(id(tensor))
        if wanted in leaves:
            found[name] = leaves[wanted]
            continue
        plain = tensor.detach().to(device)
        # What was made in inference mode cannot take part in a backward pass; its copy can.
        found[name] = plain.clone() if plain.is_inference() else plain
        if wanted is not None:
            leaves[wanted] = found[name].requires_grad_()
            hook = _adder(totals[wanted])
            leaves[wanted].register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    return found


def _adder(total: Tensor) -> Callable[[Tensor], None]:
    def add(leaf: Tensor) -> None:
        assert leaf.grad is not None
        gradient = leaf.grad.float()
        total.addcmul_(gradient, gradient)
        leaf.grad = None

    return add


def _outputs(
    program: Program,
    model: nn.Module,
    stand_ins: dict[str, Tensor],
    row: dict[str, Tensor],
    device: torch.device,
) -> list[Tensor]:
    if model is program.module:
        given = {"input_ids": row["input_ids"].to(device), "use_cache": False}
        return [functional_call(model, stand_ins, (), given, tie_weights=False).logits]
    _, spec = pytree.tree_flatten(program.signature.args)
    args: Any = pytree.tree_unflatten(list(graph_inputs(program, row)), spec)
    result = functional_call(model, stand_ins, tuple(args), tie_weights=False)
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def _loss(
    owner: Pass,
    program: Program,
    loss: str,
    outputs: list[Tensor],
    row: dict[str, Tensor],
    generator: torch.Generator,
) -> Tensor:
    is_classes = outputs[0].dim() == 2 and outputs[0].shape[1] > 1
    if loss == "auto":
        is_text = is_language_model(program)
        loss = "next-token" if is_text else "labels" if is_classes else "outputs"
    if loss == "outputs":
        return noise_loss(outputs, generator)
    shape = list(outputs[0].shape)
    if loss == "labels":
        if not is_classes:
            raise UserInputError(
                f"{owner.name}: loss is labels, but the first output is {shape}, not class scores "
                "(batch, classes); choose outputs"
            )
        return sampled_label_loss(outputs[0], generator)
    ids = row.get("input_ids")
    if ids is None or len(shape) != 3 or shape[1] < 2:
        raise UserInputError(
            f"{owner.name}: loss is next-token, but the model does not score each next token of "
            f"input_ids (its first output is {shape}, wanted batch, 2 or more tokens, vocabulary)"
        )
    return next_token_loss(outputs[0], ids.to(outputs[0].device))
