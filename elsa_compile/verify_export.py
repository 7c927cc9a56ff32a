"""The exported file against the torch program: logits, greedy tokens, perplexity.

Logits are compared for several shapes, with the KV cache filled by a real prefill; greedy tokens
through a recorded probe that also lies in the report, so that `elsa-run verify` can repeat the
check anywhere; perplexity over the same windows on both sides. Tolerances are relative to
max(1, largest |reference|).
"""

import logging
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils import _pytree as pytree

from elsa_compile import data as data_module
from elsa_compile.genai import vocabulary
from elsa_compile.program import Program
from elsa_compile.runtime import probe as probes
from elsa_compile.runtime.session import run_failure
from elsa_compile.runtime.verify import Check

log = logging.getLogger(__name__)

# onnxruntime sums in another order than torch, layer upon layer: 1e-6 to 1e-4 is seen. An export
# gone wrong (a lost mask, a transposed weight) is off by 0.1 and more.
TOLERANCE = 1e-3
PERPLEXITY_TOLERANCE = 1e-3  # relative: 0.1 %
# Of onnxruntime's int8 activations, worth a warning. It is no fault of the file: the bound above
# holds with exact products.
ROUNDING_WORTH_SAYING = 5e-3
_DECODER_SHAPES = ((1, 1, 0), (1, 7, 0), (3, 11, 4), (2, 1, 9))  # batch, sequence, past
_ENCODER_SHAPES = ((1, 4), (3, 11))  # batch, sequence


def record_probe(program: Program, file: str) -> dict[str, Any]:
    """Reference answers of the torch program, for `elsa-run verify`."""
    if program.kind == "decoder":

        def run(ids: NDArray[np.int64]) -> NDArray[Any]:
            scores: NDArray[Any] = data_module.logits(program, torch.from_numpy(ids)).numpy()
            return scores

        size = vocabulary(program)
        return probes.language_probe(run, size, tolerance=TOLERANCE, file=file)
    leaves = pytree.tree_leaves(program.signature.args)
    names = program.signature.input_names
    inputs = {
        name: (str(leaf.dtype).removeprefix("torch."), list(leaf.shape))
        for name, leaf in zip(names, leaves, strict=True)
    }

    def run_generic(feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        outputs = _torch(program, [torch.from_numpy(feeds[name]) for name in names])
        return dict(zip(program.signature.output_names, outputs, strict=True))

    return probes.generic_probe(run_generic, inputs, tolerance=TOLERANCE, file=file)


def check_logits(program: Program, session: Any) -> Check:
    """Every output of the file against the torch program, for several shapes.

    Args:
        program: after all passes.
        session: onnxruntime session of the exported file.
    """
    worst, faults, shapes = 0.0, [], []
    for label, flat in _cases(program):
        wanted = _torch(program, flat)
        feeds = {
            name: np.ascontiguousarray(value.numpy())
            for name, value in zip(program.signature.input_names, flat, strict=True)
        }
        try:
            found = session.run(list(program.signature.output_names), feeds)
        except Exception as error:  # onnxruntime raises kinds of its own
            said = run_failure(error, label)
            return Check("logits", False, str(said))
        for name, one, other in zip(program.signature.output_names, found, wanted, strict=True):
            if one.shape != other.shape:
                faults.append(f"{name} has shape {list(one.shape)}, wanted {list(other.shape)}")
            else:
                worst = max(worst, _relative(one, other))
        shapes.append(label)
    what = f"{len(program.signature.output_names)} outputs at {'; '.join(shapes)}"
    if faults:
        return Check("logits", False, f"{what}: {faults[0]}", worst, TOLERANCE)
    detail = f"{what}: largest difference {worst:.1e} (at most {TOLERANCE:.0e})"
    return Check("logits", worst <= TOLERANCE, detail, worst, TOLERANCE)


def check_perplexity(torch_side: float, onnx_side: float, what: str) -> Check:
    """Both perplexities within 0.1 %.

    Example: 20.00 and 20.01 pass (0.05 %), 20.00 and 20.03 do not (0.15 %).
    """
    if torch_side == onnx_side:  # two infinities are equal and have no difference
        difference = 0.0
    else:
        difference = abs(onnx_side - torch_side) / max(abs(torch_side), 1e-30)
    ok = bool(difference <= PERPLEXITY_TOLERANCE)  # False for NaN
    detail = (
        f"{what}: torch {torch_side:.4f}, onnxruntime {onnx_side:.4f}, {difference:.1e} apart "
        f"(at most {PERPLEXITY_TOLERANCE:.0e})"
    )
    return Check("perplexity", ok, detail, difference, PERPLEXITY_TOLERANCE)


def rounding_warning(exact: float, rounded: float) -> str | None:
    """What to say of the perplexity with onnxruntime's int8 activations when it is 0.5 % off."""
    if rounded == exact or abs(rounded - exact) <= ROUNDING_WORTH_SAYING * abs(exact):
        return None
    return (
        f"onnxruntime rounds activations to int8 by default: perplexity {rounded:.4f} instead of "
        f"{exact:.4f}; the pass quantize-activations with to=float32 makes products exact"
    )


def _cases(program: Program) -> list[tuple[str, list[Tensor]]]:
    """(label, flat inputs) to compare on."""
    generator = torch.Generator().manual_seed(0)
    examples = pytree.tree_leaves(program.signature.args)
    if program.kind == "decoder":
        return [
            (f"batch {b}, sequence {s}, past {p}", _decoder_case(program, b, s, p, generator))
            for b, s, p in _DECODER_SHAPES
        ]
    if program.kind == "encoder":
        size = int((program.config or {}).get("vocab_size") or 2)
        cases = []
        for batch, length in _ENCODER_SHAPES:
            ids = torch.randint(0, size, (batch, length), generator=generator)
            mask = torch.ones_like(ids)
            mask[-1, length - length // 3 :] = 0  # padding at the end of one row
            row = {"input_ids": ids, "attention_mask": mask}
            known = {n: v for n, v in row.items() if n in program.signature.input_names}
            flat = list(data_module.graph_inputs(program, known))
            cases.append((f"batch {batch}, sequence {length}", flat))
        return cases
    cases = [("the example inputs", list(examples))]
    axes = program.signature.axes
    if all(0 in axes.get(name, {}) for name in program.signature.input_names):
        for batch in (1, 3):
            flat = [_rows(example, batch) for example in examples]
            cases.append((f"batch {batch}", flat))
    return cases + _other_sizes(program, examples)


def _other_sizes(program: Program, examples: list[Tensor]) -> list[tuple[str, list[Tensor]]]:
    """The example inputs with each dynamic axis but the batch one shorter, where torch takes it."""
    axes = program.signature.axes
    cases = []
    for symbol in dict.fromkeys(s for dims in axes.values() for s in dims.values() if s != "batch"):
        flat, size = [], 0
        for name, example in zip(program.signature.input_names, examples, strict=True):
            shorter = example
            for axis, found in axes.get(name, {}).items():
                if found == symbol:
                    size = max(example.shape[axis] - 1, 1)
                    shorter = shorter.narrow(axis, 0, size)
            flat.append(shorter.contiguous())
        try:
            _torch(program, flat)
        except Exception as error:  # a size that the program itself does not take
            log.debug("not compared at %s = %d: %s", symbol, size, error)
        else:
            cases.append((f"{symbol} = {size}", flat))
    return cases


def _decoder_case(
    program: Program, batch: int, length: int, past: int, generator: torch.Generator
) -> list[Tensor]:
    """Inputs of one step whose past is a real prefill, the last row left-padded if it can be."""
    ids = torch.randint(0, vocabulary(program), (batch, past + length), generator=generator)
    mask = torch.ones_like(ids)
    if batch > 1 and past + length > 4:
        mask[-1, :2] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = [_rows(x, batch)[:, :, :0] for x in program.signature.args[3]]
    if past:
        spec_args = (ids[:, :past], mask[:, :past], positions[:, :past].contiguous(), cache)
        cache = list(pytree.tree_leaves(program.run(*spec_args)))[1:]
    return [ids[:, past:].contiguous(), mask, positions[:, past:].contiguous(), *cache]


def _rows(example: Tensor, batch: int) -> Tensor:
    """`example` with `batch` rows, repeating its own."""
    repeats = -(-batch // max(example.shape[0], 1))
    return torch.cat([example] * repeats)[:batch].contiguous()


def _torch(program: Program, flat: list[Tensor]) -> list[NDArray[Any]]:
    _, spec = pytree.tree_flatten(program.signature.args)
    outputs = program.run(*pytree.tree_unflatten(list(flat), spec))
    return [value.detach().numpy() for value in pytree.tree_leaves(outputs)]


def _relative(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Largest |difference| over max(1, largest |wanted|); inf when something is not finite."""
    if not wanted.size:
        return 0.0
    exact = wanted.astype(np.float64)
    worst = float(np.abs(found.astype(np.float64) - exact).max())
    return worst / max(1.0, float(np.abs(exact).max())) if np.isfinite(worst) else float("inf")


def made_up_windows(program: Program) -> NDArray[np.int64]:
    """Windows (2, 32) of made-up tokens, for comparing perplexities where no text was given."""
    return probes.prompt_tokens(vocabulary(program), 2, 32, seed=3)
