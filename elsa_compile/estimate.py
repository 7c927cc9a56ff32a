"""--dry-run: memory, time and output size of a compilation, before its weights are loaded.

The plan is made for real, by the recipe's own allocation passes on weights without values, so a
pattern that does not fit is found here. Sizes of weights follow from it exactly but for chance
(index lengths of uniformly spread zeros), that of the graph is a constant for each matrix; time and
memory are extrapolated from a matrix product timed here and from constants measured on SmolLM2-135M
(docs/results), good to a factor of about two.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from elsa_compile import compiler, frontend, hub_models
from elsa_compile.pass_base import Context
from elsa_compile.program import Program, Signature, Weight
from elsa_compile.progress import Silent

_INTERPRETER_BYTES = 700 << 20  # torch, transformers and onnxruntime, imported
_COPIES = 4.0  # of the weights in float32 at the peak: program, export, onnxruntime's load
_EXPORT_S = 6.0
_EXPORT_PER_WEIGHT_S = 0.25  # tracing and exporting grow with the number of graph nodes
# The graph, for each matrix: 840 (tiny-llama) to 1440 (SmolLM2), November 2026.
_GRAPH_BYTES = 1300
_HEADER_BYTES = 60  # name and shape of a weight
_BYTES_A_TOKEN = 4  # of English text
_EFFICIENCY = 0.5  # of a large matrix product, reached by a whole forward pass


@dataclass(frozen=True)
class Estimate:
    """What a compilation will take.

    Attributes:
        parameters: of the model.
        planned_zeros: weights that will be zero.
        output_bytes: of the .onnx file with its data.
        dense_bytes: of the same file with every weight dense and not quantised.
        memory_bytes: peak of the process.
        seconds: of the whole compilation.
        passes: names of the passes.
    """

    parameters: int
    planned_zeros: int
    output_bytes: int
    dense_bytes: int
    memory_bytes: int
    seconds: float
    passes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    def to_text(self) -> str:
        """For people."""
        share = self.planned_zeros / max(self.parameters, 1)
        ratio = self.output_bytes / max(self.dense_bytes, 1)
        return "\n".join(
            (
                f"passes      {', '.join(self.passes)}",
                f"parameters  {self.parameters:,}, {share:.1%} of them will be zero",
                f"output      about {_size(self.output_bytes)}, {ratio:.2f} of the dense file's "
                f"{_size(self.dense_bytes)}",
                f"memory      about {_size(self.memory_bytes)} at the peak",
                f"time        about {_time(self.seconds)} on this machine",
                "Nothing was written.",
            )
        )


def estimate(args: compiler.CompileArgs) -> Estimate:
    """Estimate a compilation; everything that can be refused early is refused.

    Raises:
        UserInputError: as the compilation would.
        UnsupportedModelError: an architecture that is not known.
    """
    compiler.check(args)
    program = _described(args)
    ctx = Context(None, torch.device("cpu"), args.seed, Silent())
    for step in args.recipe.passes:
        if step.name.startswith("allocate-"):
            step.run(program, ctx)
    float_bytes = 4 if args.dtype == "fp32" else 2
    dense = output = zeros = 0
    for weight in program.weights.values():
        size = weight.parameter.numel()
        plan = program.plans.get(weight.name)
        sparsity = plan.sparsity if plan is not None and plan.skipped is None else 0.0
        # Norms and biases stay in float32.
        dense_bytes = size * (4 if weight.kind == "other" else float_bytes)
        stored_bytes, scale_bytes, value_bytes = dense_bytes, 0, float_bytes
        value_bits = 8 * float_bytes
        for step in args.recipe.passes:
            bits, scales = step.stored_bits(weight, program.kind == "decoder") or (0, 0)
            if bits:
                stored_bytes, scale_bytes, value_bytes = -(-size * bits // 8), scales, bits // 8
                value_bits = bits
        coo_bytes = (1 - sparsity) * size * (value_bytes + index_bytes(size))
        mode = args.sparse_initializers
        takes_coo = (
            sparsity > 0
            and mode != "never"
            and value_bytes > 0  # int4 has no sparse form
            and (coo_bytes < stored_bytes or mode == "always")
        )
        weight_bytes = coo_bytes if takes_coo else stored_bytes
        if args.format == "packed" and sparsity > 0:
            weight_bytes = min(weight_bytes, size / 8 + (1 - sparsity) * size * value_bits / 8)
        frame = _HEADER_BYTES + (0 if weight.kind == "other" else _GRAPH_BYTES)
        dense += dense_bytes + frame
        output += round(weight_bytes) + scale_bytes + frame
        zeros += round(sparsity * size)
    parameters = sum(w.parameter.numel() for w in program.weights.values())
    return Estimate(
        parameters=parameters,
        planned_zeros=zeros,
        output_bytes=output,
        dense_bytes=dense,
        memory_bytes=int(
            _INTERPRETER_BYTES
            + max(_COPIES * 4 * parameters, 4 * parameters + _training(args, program)[1])
        ),
        seconds=_seconds(args, program),
        passes=tuple(step.name for step in args.recipe.passes),
    )


def index_bytes(size: int) -> float:
    """Mean length in bytes of a varint index into `size` elements, all equally likely.

    >>> index_bytes(256)  # half of 0 ... 255 take one byte, half two
    1.5
    """
    total, low = 0, 0
    for length in range(1, 11):
        high = min(size, 1 << (7 * length))
        total += (high - low) * length
        low = high
        if high == size:
            break
    return total / max(size, 1)


def _described(args: compiler.CompileArgs) -> Program:
    """The model's weights without their values where a configuration tells them."""
    path = Path(str(args.model)) if isinstance(args.model, (str, Path)) else None
    if path is not None and path.is_dir():
        hub_models.weight_files(path)
        return _from_config(hub_models.read_config(path), path)
    return frontend.load(
        args.model,
        args.example_inputs,
        config=args.config,
        tokenizer=args.tokenizer,
        allow_pickle=args.allow_pickle,
    )


def _from_config(config: Any, path: Path) -> Program:
    with torch.device("meta"):
        model = hub_models.build(config, str(path))
    weights: dict[str, Weight] = {}
    seen: dict[int, str] = {}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    head = getattr(output, "weight", None)
    is_decoder = frontend.is_causal(model)
    for owner_name, owner in model.named_modules():
        for name, parameter in owner.named_parameters(owner_name, recurse=False):
            if id(parameter) in seen:
                continue
            seen[id(parameter)] = name
            weights[name] = _weight(name, owner, parameter, parameter is head)
    return Program(
        fx.GraphModule(nn.Module(), fx.Graph()),
        Signature((), None, [], [], {}),
        "decoder" if is_decoder else "encoder",
        weights,
        config=config.to_dict(),
        folder=path,
        source=path.name,
    )


def _weight(name: str, owner: nn.Module, parameter: nn.Parameter, is_head: bool) -> Weight:
    matrix = name.endswith("weight") and parameter.dim() >= 2
    kind: Any = "other"
    if matrix and isinstance(owner, nn.Embedding):
        kind = "embedding"
    elif matrix:
        kind = "conv" if parameter.dim() > 2 else "linear"
    transposed = type(owner).__name__ == "Conv1D"
    return Weight(name, name, parameter, kind, transposed, is_head, type(owner).__name__)


def _seconds(args: compiler.CompileArgs, program: Program) -> float:
    """Forward passes of calibration and evaluation, second-order updates, tracing, export."""
    products_per_s = _products_per_s()
    matrices = [w.matrix_shape for w in program.weights.values() if w.kind in ("linear", "conv")]
    per_token = sum(n * k for n, k in matrices)
    window = args.window or 512
    work = 0.0
    for step in args.recipe.passes:
        if step.needs_data and not step.trains:
            # Every segment runs twice: observed, then again with its pruned weights.
            work += 2 * per_token * window * step.options().get("samples", 128) / _EFFICIENCY
        if step.name == "prune-sparsegpt":
            work += sum(window * 128 * k * k + 3 * k**3 + n * k * k for n, k in matrices)
    # Forward, twice that backward, and the dense model's forward pass.
    trained = 4 * (per_token + _head_products(program)) * _training(args, program)[0] / _EFFICIENCY
    if args.eval_data is not None:
        # Dense, compiled and in onnxruntime.
        windows = args.max_windows or 128
        work += 3 * (per_token + _head_products(program)) * window * windows / _EFFICIENCY
    fixed = _EXPORT_S + _EXPORT_PER_WEIGHT_S * len(matrices)
    if trained:
        fixed += trained / max(products_per_s, _products_per_s(torch.bfloat16))
    return fixed + work / products_per_s


def _training(args: compiler.CompileArgs, program: Program) -> tuple[int, int]:
    """(tokens trained on, most bytes held for it) over the passes that train."""
    parameters = sum(w.parameter.numel() for w in program.weights.values())
    corpus = 1 << 20
    if isinstance(args.data, Path) and args.data.is_file():
        corpus = args.data.stat().st_size // _BYTES_A_TOKEN
    window = args.window or 512
    found = [s.training_work(parameters, corpus, window) for s in args.recipe.passes if s.trains]
    held = max((held for _, held in found), default=0)
    logits = 3 * 4 * 2048 * _head_products(program) // max(_width(program), 1) if found else 0
    return sum(tokens for tokens, _ in found), held + logits


def _width(program: Program) -> int:
    """Hidden width of a language model, by its embedding (vocabulary, width)."""
    shapes = [w.parameter.shape for w in program.weights.values() if w.kind == "embedding"]
    return max((int(shape[1]) for shape in shapes), default=0)


def _head_products(program: Program) -> int:
    sizes = [w.parameter.numel() for w in program.weights.values() if w.kind == "embedding"]
    return max(sizes, default=0)


def _products_per_s(dtype: torch.dtype = torch.float32) -> float:
    """Multiply-adds a second of a large matrix product here, the best of three."""
    size = 768
    a, b = torch.randn(2, size, size).to(dtype)
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - started)
    return size**3 / best


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}" if count >= 1 else "0 B"
        count /= 1024
    return f"{count:.2f} GiB"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


__all__ = ["Estimate", "estimate", "index_bytes"]
