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
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from elsa_compile.errors import ElsaError, UserInputError
from elsa_compile.pass_base import Context, PassStats
from elsa_compile.passes.adam import Adam
from elsa_compile.passes.gradient_release import GradientRelease
from elsa_compile.passes.objective import (
    Batch,
    Objective,
    Trust,
    checkpointed,
    placed,
    trainable,
)
from elsa_compile.passes.snapshots import Snapshot, Snapshots, fingerprint
from elsa_compile.passes.training_options import (
    Settings,
    TrainingPass,
    learning_rate,
    resolve,
    warm_up,
)
from elsa_compile.program import Program

log = logging.getLogger(__name__)

CLIP = 1.0  # global norm of the task's gradient
ATTEMPTS = 2  # times a diverging run goes back and halves its step
MOST_REPEATS = 2.0  # of the data; beyond, the dense model is what keeps from learning it by heart
VALIDATIONS = 12  # of the held-out windows, over a run
# A validation costs three forward passes, a row that is trained on some four: with one held-out row
# in so many rows trained on, all validations take a seventh of the training.
ROWS_A_WATCHED = 64
LEAST_WATCHED = 8


class Constraint(Protocol):
    """What keeps the weights in, or draws them to, a set of sparse matrices."""

    def add_gradient(self, step: int) -> None:
        """Add the constraint's own gradient to the clipped one of the task."""

    def after_step(self, step: int) -> dict[str, float]:
        """Change the weights after the optimizer's step; what is worth plotting."""

    @property
    def is_projected(self) -> bool:
        """Whether `projected` changes nothing."""

    def projected(self) -> contextlib.AbstractContextManager[None]:
        """The weights as they would be if the run ended now; as they are afterwards."""

    def tensors(self) -> dict[str, Tensor]:
        """State for a snapshot."""

    def load(self, tensors: dict[str, Tensor]) -> None:
        """State from a snapshot, at the step it was taken."""


@dataclass
class History:
    """Numbers along a run, by name: (step, value) pairs."""

    curves: dict[str, list[list[float]]] = field(default_factory=dict)

    def add(self, step: int, values: dict[str, float]) -> None:
        """Append one value to each curve."""
        for name, value in values.items():
            self.curves.setdefault(name, []).append([float(step), float(value)])


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
        self.release = GradientRelease(self.adam, CLIP) if owner.gradient_release else None
        self.constraint: Constraint | None = None
        watched = max(LEAST_WATCHED, settings.steps * settings.batch_size // ROWS_A_WATCHED)
        self.validation: list[Batch] = spread_rows(stream.validation(), watched)
        self.history = History()
        self.step = 0
        self.lr_scale = 1.0
        self.attempts = 0

    # --- One step -------------------------------------------------------------------------

    def gradient(self) -> float:
        """Gradients of the mean loss over the step's batch; returns the loss."""
        rows = self.stream.batch(self.step, self.settings.batch_size)
        count = len(next(iter(rows.values())))
        total = 0.0
        for start in range(0, count, self.settings.micro_batch):
            part = {k: v[start : start + self.settings.micro_batch] for k, v in rows.items()}
            share = len(next(iter(part.values()))) / count
            loss = self.objective(part) * share
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total

    def advance(self) -> float:
        """One step; returns the loss before it.

        Raises:
            Diverged: the loss or the gradient is not finite, or the loss exploded.
        """
        assert self.constraint is not None
        if self.release is not None:
            self.release.begin(self.lr())
        loss = self.gradient()
        norm = self._clip()
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise Diverged(f"the loss is {loss:g}, its gradient's norm {norm:g}")
        self._watch(loss)
        with torch.no_grad():
            if self.release is None:
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

    def _clip(self) -> float:
        """Scale the gradient to a norm of 1 at most; its norm before."""
        if self.release is not None:  # it has clipped and stepped during the backward pass
            return self.release.finish()
        return float(nn.utils.clip_grad_norm_(self.parameters, CLIP, foreach=True))

    def repeats(self) -> float:
        """How often the run goes over its data."""
        rows: int = self.settings.steps * self.settings.batch_size
        return rows / max(1, int(self.stream.count))

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
        if loss is not None and self.repeats() <= MOST_REPEATS:
            dense = self.objective.judge(self.validation)
        else:
            dense = self.objective.mean(self.validation, loss)
        if self.constraint.is_projected:
            sparse = dense
        else:
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
            contextlib.nullcontext() if self.release is None else self.release.attached(),
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
            "norm": self.release.norm if self.release is not None else 0.0,
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
        if self.release is not None:
            self.release.norm = snapshot.notes["norm"]


class Diverged(Exception):
    """The run left the region where training works."""


def spread_rows(batches: list[Batch], most: int) -> list[Batch]:
    """At most so many rows of the batches, evenly spread over them.

    >>> rows = {"x": torch.arange(8)}
    >>> [batch["x"].tolist() for batch in spread_rows([rows, rows], 5)]
    [[0, 3, 6], [1, 4]]
    """
    sizes = [len(next(iter(batch.values()))) for batch in batches]
    total = sum(sizes)
    if total <= most:
        return batches
    kept = [i * total // most for i in range(most)]
    found, first = [], 0
    for batch, size in zip(batches, sizes, strict=True):
        inside = [place - first for place in kept if first <= place < first + size]
        if inside:
            found.append({name: rows[inside] for name, rows in batch.items()})
        first += size
    return found


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


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
