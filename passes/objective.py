"""The loss that training minimises: cross-entropy, distillation from the dense model, or both.

    ce     next-token cross-entropy of a language model, in nats a token
    kd     Kullback-Leibler divergence from the dense model's distribution, in nats a row
    ce+kd  (1 - a) ce + a kd, where a is half the trust in the dense model; see `Trust`
    mse    squared distance to the dense model's outputs, in units of their variance

Models without next tokens (encoders, convolutional networks, anything from a .pt2) learn from the
dense model alone: `kd` or `mse` need inputs and no labels.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from elsa_compile.data import graph_inputs
from elsa_compile.errors import UserInputError
from elsa_compile.passes.token_loss import token_loss
from elsa_compile.program import Program

Loss = Literal["auto", "ce", "kd", "ce+kd", "mse"]
Batch = dict[str, Tensor]


def resolve_loss(loss: str, program: Program) -> str:
    """`auto` by kind of model.

    Raises:
        UserInputError: cross-entropy for a model that predicts no tokens.
    """
    is_language_model = program.kind == "decoder" or (
        program.kind == "generic" and "input_ids" in program.signature.input_names
    )
    if loss == "auto":
        return "ce+kd" if is_language_model else "mse"
    if "ce" in loss and not is_language_model:
        raise UserInputError(
            f"loss is {loss!r}, but {program.source} predicts no next tokens; choose kd (outputs "
            "are class scores) or mse"
        )
    return loss


def output_loss(outputs: list[Tensor], dense: list[Tensor]) -> Tensor:
    """Mean over outputs of ||output - dense||^2 / ||dense - mean(dense)||^2."""
    parts = []
    for value, wanted in zip(outputs, dense, strict=True):
        if not value.is_floating_point():
            continue
        wanted = wanted.float()
        spread = (wanted - wanted.mean()).square().mean().clamp_min(1e-12)
        parts.append((value.float() - wanted).square().mean() / spread)
    return torch.stack(parts).mean()


@dataclass
class Trust:
    """How far the dense model is right where the trained one differs from it.

    If text were drawn from the dense model, the trained one's excess cross-entropy would equal its
    divergence KL(dense || trained). The ratio of the two, in [0, 1], is thus the part of the
    divergence that is error; the rest is what the trained model knows better. A dense model that
    the data can still improve would otherwise hold the pruned one back.

    Attributes:
        excess: cross-entropy of the trained model less that of the dense one, nats a token, on
            held-out text: on text it was trained on it only shows what it has learnt by heart.
        divergence: nats a token, on the same text.
    """

    excess: float = 0.01
    divergence: float = 0.01

    def value(self) -> float:
        """Excess over divergence, between 0 and 1."""
        return min(1.0, max(0.0, self.excess / max(self.divergence, 1e-9)))


class Objective:
    """The loss of a program on batches.

    Attributes:
        loss: resolved name.
        trust: in the dense model, for ce+kd.
        costs: (3,) of the last call: both models' cross-entropy, and the divergence.
    """

    def __init__(
        self, program: Program, loss: str, device: torch.device, half: bool = False
    ) -> None:
        """Prepare the model, and a copy of its dense weights when they teach.

        Args:
            program: its Parameters are trained; called through its module when it has one.
            loss: "ce", "kd", "ce+kd" or "mse".
            device: where the model lies.
            half: run matrix products in bfloat16 (autocast); weights and losses stay float32.
        """
        self.loss = loss
        self.program, self.device, self.half = program, device, half
        self.model: nn.Module = program.graph_module
        if program.kind == "decoder" and program.module is not None:
            self.model = program.module
        self.trust = Trust()
        self.costs = torch.zeros(3, device=device)
        self.dense: dict[str, Tensor] | None = None
        if self.loss != "ce":
            products = _product_weights(self.model) if half else set()
            self.dense = {
                n: p.detach().to(torch.bfloat16 if n in products else p.dtype, copy=True)
                for n, p in self.model.named_parameters()
            }

    def __call__(self, batch: Batch, loss: str | None = None) -> Tensor:
        """Mean loss () of a batch, differentiable. `loss` replaces the objective's own."""
        loss = loss or self.loss
        outputs = self._outputs(batch, None)
        dense: list[Tensor] = []
        if loss != "ce":
            assert self.dense is not None
            with torch.no_grad():
                dense = self._outputs(batch, self.dense)
        if loss == "mse":
            return output_loss(outputs, dense)
        ids = batch["input_ids"].to(self.device) if loss != "kd" else None
        share = {"ce": 0.0, "kd": 1.0}.get(loss, self.share())
        value, costs = token_loss(outputs[0], ids, dense[0] if dense else None, share)
        self.costs = costs
        return value

    def share(self) -> float:
        """Weight of the divergence in ce+kd."""
        return 0.5 * self.trust.value()

    def _outputs(self, batch: Batch, weights: dict[str, Tensor] | None) -> list[Tensor]:
        args, kwargs = self._arguments(batch)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            if weights is None:
                result = self.model(*args, **kwargs)
            else:
                result = functional_call(self.model, weights, args, kwargs)
        if kwargs:
            return [result.logits]
        return [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]

    def _arguments(self, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self.model is self.program.module:
            ids = batch["input_ids"].to(self.device)
            return (), {"input_ids": ids, "use_cache": False}
        flat = [t.to(self.device) for t in graph_inputs(self.program, batch)]
        _, spec = pytree.tree_flatten(self.program.signature.args)
        return tuple(pytree.tree_unflatten(flat, spec)), {}

    @torch.no_grad()
    def judge(self, batches: list[Batch]) -> float:
        """Cross-entropy of held-out batches, in nats; sets the trust in the dense model by them."""
        total, count = torch.zeros(3), 0
        for batch in batches:
            rows = len(next(iter(batch.values())))
            self(batch)
            total, count = total + self.costs.cpu() * rows, count + rows
        trained, dense, divergence = (total / max(count, 1)).tolist()
        self.trust = Trust(trained - dense, divergence)
        return float(trained)

    @torch.no_grad()
    def mean(self, batches: list[Batch], loss: str | None = None) -> float:
        """Mean loss over batches, weighted by rows."""
        total = count = 0.0
        for batch in batches:
            rows = len(next(iter(batch.values())))
            total += float(self(batch, loss)) * rows
            count += rows
        return total / count if count else math.nan


def _product_weights(model: nn.Module) -> set[str]:
    """Names of weights that only matrix products read: autocast rounds them to bfloat16 anyway."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module.weight) not in tables
    }


@contextlib.contextmanager
def placed(program: Program, device: torch.device) -> Iterator[None]:
    """The program's weights and constants on a device; back on the CPU afterwards.

    The traced graph names the device it was traced on in its constants: those nodes are told too.
    """
    if device.type == "cpu":
        yield
        return
    try:
        _move(program, device)
        yield
    finally:
        _move(program, torch.device("cpu"))


def _move(program: Program, device: torch.device) -> None:
    for module in (program.module, program.graph_module):
        if module is not None:
            module.to(device)
    for node in program.graph_module.graph.nodes:
        if isinstance(node, fx.Node) and "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": device}
    program.graph_module.recompile()


@contextlib.contextmanager
def trainable(program: Program) -> Iterator[list[tuple[str, nn.Parameter]]]:
    """All parameters with gradients on, each once; as they were afterwards.

    Yields:
        (name, parameter): canonical names for weights, the module's own for all others.
    """
    names = {id(w.parameter): w.name for w in program.weights.values()}
    owner = program.module if program.module is not None else program.graph_module
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for name, parameter in owner.named_parameters():
        found[id(parameter)] = (names.get(id(parameter), name), parameter)
    before = [(p, p.requires_grad) for _, p in found.values()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(parameter.is_floating_point())
        yield list(found.values())
    finally:
        for parameter, state in before:
            parameter.grad = None
            parameter.requires_grad_(state)


@contextlib.contextmanager
def checkpointed(module: nn.Module | None, wanted: bool) -> Iterator[None]:
    """Recompute the activations of each block in the backward pass instead of keeping them.

    Blocks are the entries of the module's longest ModuleList.

    Raises:
        UserInputError: there are no blocks to recompute.
    """
    if not wanted:
        yield
        return
    lists = [m for m in module.modules() if isinstance(m, nn.ModuleList)] if module else []
    blocks = max(lists, key=len, default=nn.ModuleList())
    if len(blocks) < 2:
        raise UserInputError(
            "checkpoint_activations: the model has no list of blocks to recompute; leave it off or "
            "use a smaller micro_batch"
        )
    from torch.utils.checkpoint import checkpoint

    own = [block.__dict__.get("forward") for block in blocks]  # None: the class's

    def recomputing(forward: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)

        return call

    try:
        for block in blocks:
            block.forward = recomputing(block.forward)
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward
