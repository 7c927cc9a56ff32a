"""Options of the passes that train, and the numbers they stand for."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from elsa_compile.errors import UserInputError
from elsa_compile.pass_base import Context, Pass, option
from elsa_compile.passes.objective import resolve_loss
from elsa_compile.program import Program

_TOKENS_A_STEP = 4096
_TOKENS_AT_ONCE = 2048


@dataclass(frozen=True, kw_only=True)
class TrainingPass(Pass):
    """Options that all training passes share."""

    needs_data: ClassVar[bool] = True
    trains: ClassVar[bool] = True
    idempotent: ClassVar[bool] = False

    steps: int | None = option(
        None, "optimizer steps; null: twice over the data, 256 to 4096", low=1
    )
    batch_size: int | None = option(
        None, "windows a step; null: about 4096 tokens, or 32 samples", low=1
    )
    seq_len: int | None = option(
        None, "tokens a window; null: --window, or 512, or the model's longest input", low=2
    )
    micro_batch: int | None = option(
        None, "windows at once, gradients add up; null: about 2048 tokens", low=1
    )
    lr: float | str = option(
        "auto",
        "Adam's step, falling linearly to zero; auto: from the size of the weights",
        low=0.0,
        high=1.0,
        choices=("auto",),
    )
    loss: str = option(
        "auto",
        "what is minimised; kd and mse learn from the dense model; auto: ce+kd for language models",
        choices=("auto", "ce", "kd", "ce+kd", "mse"),
    )
    precision: str = option(
        "auto",
        "arithmetic of matrix products; auto: bf16 where the device has it",
        choices=("auto", "fp32", "bf16"),
    )
    states: str = option(
        "fp32", "Adam's moments: 8 bytes a parameter, or 2", choices=("fp32", "int8")
    )
    checkpoint_activations: bool = option(
        False, "recompute activations in the backward pass: less memory, a third more time"
    )
    gradient_release: bool = option(
        False,
        "update a parameter as soon as its gradient is known: gradients never all exist at once; "
        "clips by the norm of the step before",
    )
    snapshot_minutes: float = option(5.0, "time between snapshots", low=0.0)
    seed: int | None = option(None, "order of the data; null: --seed", low=0)

    def resolved_loss(self, program: Program) -> str:
        """`loss` for this model; see `objective.resolve_loss`."""
        return resolve_loss(self.loss, program)

    def budget(self, tokens: int, count: int) -> tuple[int, int]:
        """(steps, batch_size) with every null resolved.

        Args:
            tokens: of a window; 128 stands for a sample that is none.
            count: windows or samples of the data.
        """
        batch_size = self.batch_size or max(1, _TOKENS_A_STEP // tokens)
        return self.steps or min(4096, max(256, 2 * count // batch_size)), batch_size

    def training_work(self, parameters: int, corpus_tokens: int, window: int) -> tuple[int, int]:
        """Tokens of the whole run; gradients, moments, and the dense model when it teaches."""
        tokens = self.seq_len or window
        steps, batch_size = self.budget(tokens, corpus_tokens // tokens)
        held = (
            (0 if self.gradient_release else 4)
            + (8 if self.states == "fp32" else 2)
            + (0 if self.loss == "ce" else 4)
        )
        return steps * batch_size * tokens, held * parameters


@dataclass
class Settings:
    """A training pass's options with every null and auto resolved."""

    steps: int
    batch_size: int
    micro_batch: int
    lr: float
    half: bool
    seed: int


def learning_rate(step: int, steps: int, peak: float, warm_up: int) -> float:
    """Rises linearly for `warm_up` steps, then falls linearly to zero at `steps`.

    >>> [learning_rate(s, 10, 1.0, 2) for s in (0, 1, 2, 9)]
    [0.5, 1.0, 0.8, 0.1]
    """
    return peak * min((step + 1) / max(warm_up, 1), 1.0 - step / steps)


def warm_up(steps: int) -> int:
    """Steps of rising learning rate: 2 %, so that Adam's second moment is filled first."""
    return min(100, steps // 50)


def uses_bf16(precision: str, device: torch.device) -> bool:
    """What a training pass's `precision` means on a device."""
    return precision == "bf16" or (precision == "auto" and has_fast_bf16(device))


def has_fast_bf16(device: torch.device) -> bool:
    """True where bfloat16 products are faster than float32 ones: CUDA, AVX512-BF16 and AMX."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    capability = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(capability is not None and capability())


def resolve(
    owner: TrainingPass, program: Program, ctx: Context, stream: Any, seed: int
) -> Settings:
    """Numbers for every option that was left open.

    Raises:
        UserInputError: options that exclude each other.
    """
    tokens = stream.seq_len or _TOKENS_A_STEP // 32
    steps, batch_size = owner.budget(tokens, stream.count)
    at_once = batch_size if owner.gradient_release else max(1, _TOKENS_AT_ONCE // tokens)
    if owner.gradient_release and owner.micro_batch not in (None, batch_size):
        raise UserInputError(
            f"{owner.name}: gradient_release needs whole batches at once, but micro_batch is "
            f"{owner.micro_batch} and batch_size {batch_size}; set batch_size={owner.micro_batch} "
            "or leave micro_batch open"
        )
    lr = auto_lr(program) if isinstance(owner.lr, str) else owner.lr
    return Settings(
        steps=steps,
        batch_size=batch_size,
        micro_batch=min(batch_size, owner.micro_batch or at_once),
        lr=lr,
        half=uses_bf16(owner.precision, ctx.device),
        seed=seed,
    )


def auto_lr(program: Program) -> float:
    """Adam's step for a model's width: 8 d^-1.5, at most 5e-3.

    d is the geometric mean of sqrt(N K) over the planned matrices. The law was fitted to the values
    that searches found: 5e-3 for a LLaMA of width 128 (d = 147; docs/elsa.md), and the ELSA paper's
    2e-4 for OPT-125M (d = 968) and 5e-5 for OPT-1.3B (d = 2580).

    >>> f"{8 * 968 ** -1.5:.2g}"
    '0.00027'
    """
    sizes = [0.5 * math.log(math.prod(plan.shape)) for _, plan in program.planned()]
    if not sizes:
        return 1e-4
    return min(5e-3, 8.0 * math.exp(-1.5 * sum(sizes) / len(sizes)))
