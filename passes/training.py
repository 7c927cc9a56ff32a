"""Training under a constraint on the weights: the loop of prune-elsa and finetune-masked.

    for each step: gradient of the loss on a batch, clipped; the constraint's own gradient;
                   one Adam step on all parameters; what the constraint does to the weights

A run can be stopped at any moment and goes on from its last snapshot; the result is the same, bit
for bit on a CPU, because a batch depends on the seed and the step alone and everything else is in
the snapshot.
"""

import contextlib
import dataclasses
import logging
import math
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from elsa_compile.errors import ElsaError, UserInputError
from elsa_compile.pass_base import Context, Pass, PassStats, option
from elsa_compile.passes.adam import Adam
from elsa_compile.passes.objective import (
    Batch,
    Objective,
    Trust,
    checkpointed,
    placed,
    resolve_loss,
    trainable,
)
from elsa_compile.passes.snapshots import Snapshot, Snapshots, fingerprint
from elsa_compile.program import Program

log = logging.getLogger(__name__)

CLIP = 1.0  # global norm of the task's gradient
ATTEMPTS = 2  # times a diverging run goes back and halves its step
VALIDATIONS = 12  # of the held-out windows, over a run
_TOKENS_A_STEP = 4096
_TOKENS_AT_ONCE = 2048


class Constraint(Protocol):
    """What keeps the weights in, or draws them to, a set of sparse matrices."""

    def add_gradient(self, step: int) -> None:
        """Add the constraint's own gradient to the clipped one of the task."""

    def after_step(self, step: int) -> dict[str, float]:
        """Change the weights after the optimizer's step; what is worth plotting."""

    def projected(self) -> contextlib.AbstractContextManager[None]:
        """The weights as they would be if the run ended now; as they are afterwards."""

    def tensors(self) -> dict[str, Tensor]:
        """State for a snapshot."""

    def load(self, tensors: dict[str, Tensor]) -> None:
        """State from a snapshot, at the step it was taken."""


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
        held = 4 + (8 if self.states == "fp32" else 2) + (0 if self.loss == "ce" else 4)
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


@dataclass
class History:
    """Numbers along a run, by name: (step, value) pairs."""

    curves: dict[str, list[list[float]]] = field(default_factory=dict)

    def add(self, step: int, values: dict[str, float]) -> None:
        """Append one value to each curve."""
        for name, value in values.items():
            self.curves.setdefault(name, []).append([float(step), float(value)])


def learning_rate(step: int, steps: int, peak: float, warm_up: int) -> float:
    """Rises linearly for `warm_up` steps, then falls linearly to zero at `steps`.

    >>> [learning_rate(s, 10, 1.0, 2) for s in (0, 1, 2, 9)]
    [0.5, 1.0, 0.8, 0.1]
    """
    return peak * min((step + 1) / max(warm_up, 1), 1.0 - step / steps)


def uses_bf16(precision: str, device: torch.device) -> bool:
    """What a training pass's `precision` means on a device."""
    return precision == "bf16" or (precision == "auto" and has_fast_bf16(device))


def has_fast_bf16(device: torch.device) -> bool:
    """True where bfloat16 products are faster than float32 ones: CUDA, AVX512-BF16 and AMX."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    capability = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(capability is not None and capability())


class Training:
    """One run: the model, the optimizer, the constraint and where they stand."""

    def __init__(
        self,
        owner: TrainingPass,
        ctx: Context,
        program: Program,
        named: list[tuple[str, nn.Parameter]],
        stream: Any,
        settings: Settings,
    ) -> None:
        """Nothing is trained yet; `constraint` must be set before `run`."""
        self.owner, self.ctx, self.program, self.stream = owner, ctx, program, stream
        self.settings = settings
        self.objective = Objective(program, owner.resolved_loss(program), ctx.device, settings.half)
        states = "int8" if owner.states == "int8" else "fp32"
        self.adam = Adam(named, states, seed=settings.seed)  # type: ignore[arg-type]
        self.parameters = [p for _, p in named if p.requires_grad]
        self.constraint: Constraint | None = None
        self.validation: list[Batch] = stream.validation()
        self.history = History()
        self.step = 0
        self.lr_scale = 1.0
        self.attempts = 0

    # --- One step -------------------------------------------------------------------------

    def gradient(self) -> float:
        """Gradients of the mean loss over the step's batch; returns the loss."""
        rows = self.stream.batch(self.step, self.settings.batch_size)
        count = len(next(iter(rows.values())))
        total, costs = 0.0, torch.zeros(3)
        for start in range(0, count, self.settings.micro_batch):
            part = {k: v[start : start + self.settings.micro_batch] for k, v in rows.items()}
            share = len(next(iter(part.values()))) / count
            loss = self.objective(part) * share
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
            costs += self.objective.costs.cpu() * share
        if self.objective.loss == "ce+kd":
            trained, dense, divergence = costs.tolist()
            self.objective.trust.learn(trained - dense, divergence)
        return total

    def advance(self) -> float:
        """One step; returns the loss before it.

        Raises:
            Diverged: the loss or the gradient is not finite, or the loss exploded.
        """
        assert self.constraint is not None
        loss = self.gradient()
        norm = nn.utils.clip_grad_norm_(self.parameters, CLIP, foreach=True)
        if not math.isfinite(loss) or not bool(torch.isfinite(norm)):
            raise Diverged(f"the loss is {loss:g}, its gradient's norm {float(norm):g}")
        self._watch(loss)
        with torch.no_grad():
            self.constraint.add_gradient(self.step)
            self.adam.step(self.lr())
            for parameter in self.parameters:
                parameter.grad = None
            values = self.constraint.after_step(self.step)
        self.step += 1
        if values:
            if self.objective.loss == "ce+kd":
                values = values | {"distillation": self.objective.share()}
            self._tell(values | {"loss": self._recent(), "lr": self.lr()})
        return loss

    def lr(self) -> float:
        """The learning rate of the step at hand."""
        steps = self.settings.steps
        peak = self.settings.lr * self.lr_scale
        return learning_rate(min(self.step, steps - 1), steps, peak, warm_up(steps))

    def _watch(self, loss: float) -> None:
        """Remember a smoothed loss, and raise when it explodes."""
        curve = self.history.curves.setdefault("loss_smooth", [])
        last = curve[-1][1] if curve else loss
        smooth = 0.95 * last + 0.05 * loss
        curve.append([float(self.step), smooth])
        first = curve[0][1]
        if smooth > max(3.0 * first, first + 10.0):
            raise Diverged(f"the loss rose from {first:.3g} to {smooth:.3g}")

    def _recent(self) -> float:
        return self.history.curves["loss_smooth"][-1][1]

    def _tell(self, values: dict[str, float]) -> None:
        self.history.add(self.step, values)
        for name, value in values.items():
            self.ctx.progress.metric(name, value, step=self.step)

    def validate(self) -> None:
        """Loss on held-out windows, of the weights as they are and as they would be projected."""
        assert self.constraint is not None
        if not self.validation:
            return
        loss = "ce" if self.objective.loss == "ce+kd" else None  # a weight that moves misleads
        dense = self.objective.mean(self.validation, loss)
        with torch.no_grad(), self.constraint.projected():
            sparse = self.objective.mean(self.validation, loss)
        self._tell({"validation": dense, "validation_projected": sparse})

    # --- The whole run --------------------------------------------------------------------

    def run(self, snapshots: Snapshots) -> None:
        """Train from the last snapshot, or from the start, to the end.

        Raises:
            ElsaError: it diverges for the third time.
            KeyboardInterrupt: after a snapshot, when the user asked to stop.
        """
        total = self.settings.steps
        found = snapshots.latest(self.ctx.device)
        if found is not None:
            self.restore(found)
            self.ctx.progress.note(f"{self.owner.name}: goes on at step {self.step} of {total}")
        else:
            snapshots.save(self.snapshot())
        every = max(1, total // VALIDATIONS)
        saved_s = time.monotonic()
        with (
            self.ctx.progress.stage(self.owner.name, total, "steps") as stage,
            _stop_requests() as stop,
        ):
            stage.advance(self.step)
            while self.step < total:
                before = self.step
                try:
                    loss = self.advance()
                    if self.step % every == 0 or self.step == total:
                        self.validate()
                except Diverged as reason:
                    self._go_back(reason, snapshots)
                    stage.advance(self.step - before)
                    continue
                stage.advance(1, f"loss {loss:.4f}")
                late = time.monotonic() - saved_s >= 60.0 * self.owner.snapshot_minutes
                if late or stop.is_set() or self.step == total:
                    snapshots.save(self.snapshot())
                    saved_s = time.monotonic()
                if stop.is_set():
                    self.ctx.progress.note(
                        f"{self.owner.name}: stopped after step {self.step} of {total}; the same "
                        "command goes on from there"
                    )
                    raise KeyboardInterrupt

    def _go_back(self, reason: "Diverged", snapshots: Snapshots) -> None:
        attempts = self.attempts + 1
        if attempts > ATTEMPTS:
            raise ElsaError(
                f"{self.owner.name}: diverged at step {self.step} ({reason}) although the step was "
                f"halved {ATTEMPTS} times; set lr below {self.settings.lr * self.lr_scale:.2g}"
            )
        for parameter in self.parameters:
            parameter.grad = None
        where, scale = self.step, self.lr_scale / 2
        found = snapshots.latest(self.ctx.device)
        assert found is not None, "a snapshot is written before the first step"
        self.restore(found)
        self.lr_scale, self.attempts = scale, attempts
        self.ctx.progress.warn(
            f"{self.owner.name}: diverged at step {where} ({reason}); going back to step "
            f"{self.step} with half the step, lr {self.settings.lr * scale:.2g}"
        )

    def snapshot(self) -> Snapshot:
        """Everything needed to go on from here."""
        assert self.constraint is not None
        tensors = {f"weight.{n}": p.data for n, p in self.adam.parameters.items()}
        tensors |= {f"adam.{key}": value for key, value in self.adam.state().items()}
        tensors |= {f"constraint.{key}": v for key, v in self.constraint.tensors().items()}
        notes = {
            "curves": self.history.curves,
            "lr_scale": self.lr_scale,
            "attempts": self.attempts,
            "trust": dataclasses.astuple(self.objective.trust),
        }
        return Snapshot(self.step, tensors, notes)

    def restore(self, snapshot: Snapshot) -> None:
        """Go to the state of a snapshot."""
        assert self.constraint is not None
        held = snapshot.tensors
        for name, parameter in self.adam.parameters.items():
            parameter.data.copy_(held[f"weight.{name}"])
        self.step = snapshot.step
        self.adam.load_state(_under("adam.", held), snapshot.step)
        self.constraint.load(_under("constraint.", held))
        self.history = History(snapshot.notes["curves"])
        self.lr_scale = snapshot.notes["lr_scale"]
        self.attempts = snapshot.notes["attempts"]
        self.objective.trust = Trust(*snapshot.notes["trust"])


class Diverged(Exception):
    """The run left the region where training works."""


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def warm_up(steps: int) -> int:
    """Steps of rising learning rate: 2 %, so that Adam's second moment is filled first."""
    return min(100, steps // 50)


@contextlib.contextmanager
def _stop_requests() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM set an event instead of tearing a step; a second one interrupts."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def request(number: int, frame: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = {s: signal.signal(s, request) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def prepared(owner: TrainingPass, program: Program, ctx: Context) -> Iterator[Training]:
    """A run with everything but its constraint; afterwards the program is as trained, on the CPU.

    Raises:
        UserInputError: no data, or not enough memory on the device.
    """
    if ctx.training is None:
        raise UserInputError(f"{owner.name} needs data to train on; give some with --data")
    seed = ctx.seed if owner.seed is None else owner.seed
    stream = ctx.training(owner.seq_len, seed)
    try:
        with (
            placed(program, ctx.device),
            trainable(program) as named,
            checkpointed(program.module, owner.checkpoint_activations),
        ):
            settings = resolve(owner, program, ctx, stream, seed)
            yield Training(owner, ctx, program, named, stream, settings)
    except (torch.cuda.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        raise UserInputError(
            f"{owner.name}: out of memory on {ctx.device}; set micro_batch=1, or "
            "checkpoint_activations=true, or use the preset elsa-l, whose states take a third"
        ) from error


def resolve(
    owner: TrainingPass, program: Program, ctx: Context, stream: Any, seed: int
) -> Settings:
    """Numbers for every option that was left open."""
    tokens = stream.seq_len or _TOKENS_A_STEP // 32
    steps, batch_size = owner.budget(tokens, stream.count)
    lr = auto_lr(program) if isinstance(owner.lr, str) else owner.lr
    return Settings(
        steps=steps,
        batch_size=batch_size,
        micro_batch=min(batch_size, owner.micro_batch or max(1, _TOKENS_AT_ONCE // tokens)),
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


def snapshots_of(owner: TrainingPass, training: Training, ctx: Context, plan: Any) -> Snapshots:
    """The run's snapshots, in the compilation's work folder or a temporary one."""
    weights = [(n, p.data) for n, p in training.adam.parameters.items()]
    identity = {f"{owner.name}.{k}": v for k, v in owner.options().items()}
    identity.pop(f"{owner.name}.snapshot_minutes")
    identity |= {
        "the model's weights": fingerprint(weights),
        "the data": training.stream.key,
        "the plan": plan,
        "the seed": training.settings.seed,
        "the device": ctx.device.type,
    }
    return Snapshots(ctx.work / owner.name if ctx.work is not None else None, identity)


def finish_stats(training: Training, stats: PassStats) -> PassStats:
    """What every training pass reports."""
    settings = training.settings
    tokens = settings.steps * settings.batch_size * (training.stream.seq_len or 1)
    stats.counts |= {
        "steps": settings.steps,
        "batch_size": settings.batch_size,
        "tokens": tokens,
        "lr": settings.lr * training.lr_scale,
        "loss": training.history.curves["loss_smooth"][-1][1],
    }
    stats.curves |= {k: v for k, v in training.history.curves.items() if k != "loss_smooth"}
    return stats
