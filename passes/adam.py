"""Adam for sparse training, with its moments in float32 or in one byte each.

Ours rather than a library's because the pruning pass reads the second moment as a score, because a
snapshot must hold the state bit for bit, and because no step may need a float32 copy of a whole
8-bit state (an embedding of 28 M entries would cost 340 MB for a moment).

One byte an entry (ELSA-L): blocks of 256 entries share one float32 scale, their largest value, and

    m = sign(c) (c / 127)^2 scale        c in -127 .. 127
    v = (c / 255)^4 scale                c in 1 .. 255

Powers give relative precision over 4 and 9 decades; rounding is stochastic, since v changes by
0.1 % a step and would otherwise stick to its old code for ever. On a CPU the step is one loop of
the native library where that was built, an eighth of the time of the same as tensor operations.
"""

import logging
import math
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from elsa_compile.errors import UserInputError
from elsa_compile.runtime import kernels

log = logging.getLogger(__name__)

States = Literal["fp32", "int8"]

BLOCK = 256
SMALL = 4096  # tensors under this size keep float32 moments
CHUNK = 1 << 20  # entries that are float32 at a time


def encode_signed(values: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """First moments to one byte each.

    Args:
        values: (B, 256) float32.
        noise: (B, 256) float32, uniform in [0, 1); 0.5 everywhere rounds to nearest.

    Returns:
        Codes (B, 256) int8 and scales (B, 1) float32.
    """
    scale = values.abs().amax(dim=1, keepdim=True)
    ratio = (values.abs() / scale.clamp_min(torch.finfo(torch.float32).tiny)).sqrt_()
    codes = ratio.mul_(127).add_(noise).floor_().clamp_(max=127)
    return (codes * values.sign()).to(torch.int8), scale


def decode_signed(codes: Tensor, scale: Tensor) -> Tensor:
    """Inverse of `encode_signed` up to rounding, float32."""
    roots = codes.float() / 127
    return roots * roots.abs() * scale


def encode_positive(values: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Second moments to one byte each; a positive value never becomes zero.

    Zero would turn m / (sqrt(v) + eps) into a step of any size.

    Args:
        values: (B, 256) float32, at least 0.
        noise: as in `encode_signed`.

    Returns:
        Codes (B, 256) uint8 and scales (B, 1) float32.
    """
    scale = values.amax(dim=1, keepdim=True)
    ratio = (values / scale.clamp_min(torch.finfo(torch.float32).tiny)).sqrt_().sqrt_()
    codes = ratio.mul_(255).add_(noise).floor_().clamp_(min=1, max=255)
    return codes.to(torch.uint8), scale


def decode_positive(codes: Tensor, scale: Tensor) -> Tensor:
    """Inverse of `encode_positive` up to rounding, float32."""
    return (codes.float() / 255).square_().square_() * scale


@dataclass
class _Piece:
    """A stretch of a parameter that is updated together with its neighbours.

    Attributes:
        name: of the parameter.
        first: its first entry.
        count: entries.
        place: where they begin within their chunk; a multiple of BLOCK.
    """

    name: str
    first: int
    count: int
    place: int


class _Bytes:
    """Moments in one byte each, of many parameters end to end, each padded to whole blocks.

    Attributes:
        start: first block of each parameter.
        chunks: (first block, blocks, pieces) of what is float32 at a time.
    """

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        """All zero.

        Args:
            parameters: on one device.
        """
        self.start: dict[str, int] = {}
        self.chunks: list[tuple[int, int, list[_Piece]]] = []
        total = first = 0
        pieces: list[_Piece] = []
        for name, parameter in parameters.items():
            self.start[name] = total
            for at in range(0, parameter.numel(), CHUNK):
                count = min(CHUNK, parameter.numel() - at)
                blocks = -(-count // BLOCK)
                if (total - first + blocks) * BLOCK > CHUNK:
                    self.chunks.append((first, total - first, pieces))
                    first, pieces = total, []
                pieces.append(_Piece(name, at, count, (total - first) * BLOCK))
                total += blocks
        if pieces:
            self.chunks.append((first, total - first, pieces))
        device = next((p.device for p in parameters.values()), torch.device("cpu"))
        self.m = torch.zeros(total, BLOCK, dtype=torch.int8, device=device)
        self.v = torch.zeros(total, BLOCK, dtype=torch.uint8, device=device)
        self.m_scale = torch.zeros(total, 1, device=device)
        self.v_scale = torch.zeros(total, 1, device=device)

    def tensors(self) -> dict[str, Tensor]:
        """The state by name."""
        return {
            "bytes.m": self.m,
            "bytes.v": self.v,
            "bytes.m_scale": self.m_scale,
            "bytes.v_scale": self.v_scale,
        }


class Adam:
    """Adam (arXiv 1412.6980) without weight decay over named parameters.

    Attributes:
        steps: steps taken.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        states: States = "fp32",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        seed: int = 0,
    ) -> None:
        """All moments zero.

        Args:
            parameters: (name, parameter); each parameter once.
            states: "fp32" (8 bytes a parameter) or "int8" (2.03 bytes).
            betas: decay of the first and second moment.
            eps: added to the root of the second moment.
            seed: of stochastic rounding.
        """
        self.parameters = dict(parameters)
        self.betas, self.eps, self.seed, self.steps = betas, eps, seed, 0
        self._m: dict[str, Tensor] = {}
        self._v: dict[str, Tensor] = {}
        large: dict[str, nn.Parameter] = {}
        for name, p in self.parameters.items():
            if states == "int8" and p.numel() >= SMALL:
                large[name] = p
            else:
                self._m[name] = torch.zeros_like(p, requires_grad=False)
                self._v[name] = torch.zeros_like(p, requires_grad=False)
        self._bytes = _Bytes(large)
        there, reason = kernels.available()
        if large and not there and self._bytes.m.device.type == "cpu":
            log.info("one-byte moments are updated by tensor operations, slower: %s", reason)
        self._noise: Tensor | None = None

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One step; a parameter without a gradient is not moved by it."""
        self.begin()
        self.update([n for n, p in self.parameters.items() if p.grad is not None], lr)

    def begin(self) -> None:
        """A step begins; its parameters are updated together or one by one, in any order."""
        self.steps += 1
        self._noise = None

    def update(self, names: list[str], lr: float) -> None:
        """The step of some parameters, whose gradients are there."""
        plain = [n for n in names if n in self._m]
        if plain:
            self._step_float(plain, lr)
        wanted = {n for n in names if n not in self._m}
        if wanted:
            self._step_bytes(wanted, lr)

    def _step_float(self, names: list[str], lr: float) -> None:
        held = [self.parameters[n] for n in names]
        gradients = [p.grad for p in held if p.grad is not None]
        counts = [torch.full((), self.steps - 1.0, device=p.device) for p in held]
        adam(
            [p.data for p in held],
            gradients,
            [self._m[n] for n in names],
            [self._v[n] for n in names],
            [],
            counts,
            foreach=False,
            capturable=False,
            differentiable=False,
            fused=True,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=lr,
            weight_decay=0.0,
            eps=self.eps,
            maximize=False,
        )

    def _step_bytes(self, names: set[str], lr: float) -> None:
        """A chunk at a time: decode, update, encode."""
        state = self._bytes
        # One draw of noise serves all chunks, shifted: drawing costs more than the update.
        noise = self._noise = self._draw() if self._noise is None else self._noise
        native = self._runs_natively(names)
        calls: list[tuple[_Piece, int, Tensor]] = []
        for index, (first, blocks, pieces) in enumerate(state.chunks):
            found = [piece for piece in pieces if piece.name in names]
            if not found:
                continue
            if native:
                shifted = noise[index * 37 % BLOCK :]
                calls += [(p, first + p.place // BLOCK, shifted[p.place :]) for p in found]
                continue
            # Whole chunks if all is there, else the blocks of the pieces that are.
            whole = len(found) == len(pieces)
            for part in [found] if whole else [[piece] for piece in found]:
                start = 0 if whole else part[0].place // BLOCK
                count = blocks if whole else -(-part[0].count // BLOCK)
                at = index * 37 % BLOCK + start * BLOCK
                dither = noise[at : at + count * BLOCK].view(count, BLOCK)
                rows = slice(first + start, first + start + count)
                self._step_chunk(rows, part, start * BLOCK, dither, lr)
        if calls:
            self._step_natively(calls, lr)

    def _runs_natively(self, names: set[str]) -> bool:
        held = [self.parameters[name] for name in names]
        there = self._bytes.m.device.type == "cpu" and kernels.available()[0]
        return there and all(p.dtype == torch.float32 for p in held)

    def _step_natively(self, calls: list[tuple[_Piece, int, Tensor]], lr: float) -> None:
        """The same by the native library; calls: piece, its first block, its noise."""
        step, state, (beta1, beta2) = kernels.library().elsa_adam_step, self._bytes, self.betas
        correction = 1 / math.sqrt(1 - beta2**self.steps)
        rate = lr / (1 - beta1**self.steps)
        settings = torch.tensor([1 - beta1, beta2, 1 - beta2, self.eps, correction, rate])
        names = {piece.name for piece, _, _ in calls}
        # Contiguous float32 copies where a gradient is something else; they live until the end.
        gradients = {
            n: g.float().contiguous() for n in names if (g := self.parameters[n].grad) is not None
        }

        def one(call: tuple[_Piece, int, Tensor]) -> int:
            piece, block, noise = call
            weights = self.parameters[piece.name].data.view(-1)[piece.first :]
            states = (state.m, state.m_scale, state.v, state.v_scale)
            failed: int = step(
                weights.data_ptr(),
                gradients[piece.name].view(-1)[piece.first :].data_ptr(),
                *(tensor[block:].data_ptr() for tensor in states),
                noise.data_ptr(),
                piece.count,
                settings.data_ptr(),
            )
            return failed

        threads = min(torch.get_num_threads(), len(calls))
        if threads > 1:
            with ThreadPoolExecutor(threads) as pool:
                failures = sum(pool.map(one, calls))
        else:
            failures = sum(map(one, calls))
        if failures:
            name = kernels.ISA_ENVIRONMENT
            raise UserInputError(f"{name} is {os.environ.get(name)!r}, unknown to this processor")

    def _draw(self) -> Tensor:
        device = self._bytes.m.device
        generator = torch.Generator(device)
        generator.manual_seed(hash((self.seed, self.steps)) & 0x7FFFFFFFFFFFFFFF)
        size = min(CHUNK, self._bytes.m.numel()) + BLOCK
        return torch.rand(size, generator=generator, device=device)

    def _step_chunk(
        self, rows: slice, pieces: list[_Piece], origin: int, dither: Tensor, lr: float
    ) -> None:
        state, (beta1, beta2) = self._bytes, self.betas
        g = torch.zeros_like(dither)
        for piece in pieces:
            gradient = self.parameters[piece.name].grad
            if gradient is not None:
                part = gradient.reshape(-1)[piece.first : piece.first + piece.count]
                g.view(-1)[piece.place - origin : piece.place - origin + piece.count] = part
        m = decode_signed(state.m[rows], state.m_scale[rows]).lerp_(g, 1 - beta1)
        v = decode_positive(state.v[rows], state.v_scale[rows])
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        root = v.sqrt().div_(math.sqrt(1 - beta2**self.steps)).add_(self.eps)
        update = torch.div(m, root, out=root).view(-1)
        for piece in pieces:
            weight = self.parameters[piece.name].data.view(-1)
            weight[piece.first : piece.first + piece.count].sub_(
                update[piece.place - origin : piece.place - origin + piece.count],
                alpha=lr / (1 - beta1**self.steps),
            )
        state.m[rows], state.m_scale[rows] = encode_signed(m, dither)
        state.v[rows], state.v_scale[rows] = encode_positive(v, dither)

    def second_moment(self, name: str) -> Tensor:
        """V of a parameter, float32 in its shape. Not corrected for bias: that is one factor."""
        if name in self._v:
            return self._v[name]
        parameter, first = self.parameters[name], self._bytes.start[name]
        rows = slice(first, first - (-parameter.numel() // BLOCK))
        flat = decode_positive(self._bytes.v[rows], self._bytes.v_scale[rows]).view(-1)
        return flat[: parameter.numel()].view_as(parameter)

    def state_bytes(self) -> int:
        """Bytes held for the moments."""
        return sum(t.numel() * t.element_size() for t in self.state().values())

    def state(self) -> dict[str, Tensor]:
        """All moments by name; the tensors themselves, not copies."""
        found = {f"m.{n}": t for n, t in self._m.items()}
        found |= {f"v.{n}": t for n, t in self._v.items()}
        return found | self._bytes.tensors()

    def load_state(self, state: dict[str, Tensor], steps: int) -> None:
        """Write moments back in place."""
        own = self.state()
        assert own.keys() == state.keys()
        for key, tensor in own.items():
            tensor.copy_(state[key])
        self.steps = steps
