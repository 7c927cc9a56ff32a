"""Update a parameter as soon as its gradient is known, and free the gradient.

Gradients then never all exist at once: 4 bytes a parameter less at the peak. The norm that clips
is that of the step before, since this step's is known only when it is over (fused
back-propagation: Lv et al., "Full Parameter Fine-tuning for Large Language Models with Limited
Resources", arXiv 2306.09782).
"""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from elsa_compile.passes.adam import Adam


class GradientRelease:
    """Steps Adam from within the backward pass.

    Attributes:
        norm: of the last whole gradient; what the next step clips by.
        lr: of the step at hand; set before the backward pass.
    """

    def __init__(self, adam: Adam, clip: float) -> None:
        """No norm is known yet: the first step is not clipped."""
        self.adam, self.clip = adam, clip
        self.norm, self.lr = 0.0, 0.0
        self._names = {id(p): name for name, p in adam.parameters.items()}
        self._squares: list[Tensor] = []

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks on all parameters with gradients."""
        handles = [
            p.register_post_accumulate_grad_hook(self._arrived)  # type: ignore[no-untyped-call]
            for p in self.adam.parameters.values()
            if p.requires_grad
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def begin(self, lr: float) -> None:
        """A step begins: its backward pass comes next."""
        self.lr, self._squares = lr, []
        self.adam.begin()

    def finish(self) -> float:
        """The step is over; the norm of its gradient."""
        self.norm = math.sqrt(float(torch.stack(self._squares).sum())) if self._squares else 0.0
        return self.norm

    @torch.no_grad()
    def _arrived(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        gradient = parameter.grad
        assert gradient is not None
        self._squares.append(gradient.float().square().sum().double().cpu())
        if self.norm > self.clip:
            gradient.mul_(self.clip / self.norm)
        self.adam.update([self._names[id(parameter)]], self.lr)
        parameter.grad = None
