"""Sentences that answer "pruned, but not faster: why?", the one that matters most first."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from elsa_compile.runtime.expected_gain import LEAST_SPARSITY
from elsa_compile.runtime.onnx_tensors import shown

if TYPE_CHECKING:
    from elsa_compile.runtime.explain import Weight

_FEW = 0.05  # fewer zeros than this are chance, no pruning
_SHARE = 0.2  # of the matrices' elements: worth a sentence
Reason = tuple[str, str]


def reasons(
    weights: Sequence["Weight"], products: Mapping[str, Any], kernels: Mapping[str, Any]
) -> list[Reason]:
    """What keeps zeros from speeding a model up: (code, sentence), never empty."""
    matrices = [weight for weight in weights if weight.role == "product"]
    if not matrices:
        return [("no-products", _no_products(weights))]
    if all(weight.form == "packed" for weight in matrices):
        return [("packed", "its matrices hold non-zeros alone, which elsa-compile's kernels read")]
    if products["sparsity"] < _FEW:
        return [("not-pruned", _not_pruned(products)), *_elsewhere(weights)]
    found = []
    pruned = [weight for weight in matrices if weight.sparsity >= _FEW]
    winning = [weight for weight in matrices if weight.expected_gain > 1.0]
    if winning:
        found.append(_runtime(winning, products, kernels))
    found += _not_taken(pruned)
    if not found:
        found.append(("too-few-zeros", _too_few(pruned)))
    found += _storage(pruned)
    found += _dense_share(matrices, products) if winning else []
    found += _structure(pruned)
    return found + _elsewhere(weights)


def _no_products(weights: Sequence["Weight"]) -> str:
    roles = ", ".join(sorted({weight.role for weight in weights})) or "none"
    return (
        "no MatMul or Gemm of the main graph has a constant matrix (roles of its weights: "
        f"{roles}), and only there do sparse kernels exist; zeros elsewhere save space at most"
    )


def _not_pruned(products: Mapping[str, Any]) -> str:
    return (
        f"its matrices are not pruned: {products['sparsity']:.2%} of {products['elements']:,} "
        "entries are zero; if the model was pruned, its masks were not applied before the export "
        "(torch.nn.utils.prune.remove, say), or later training woke the zeros up"
    )


def _too_few(pruned: Sequence["Weight"]) -> str:
    most = max(weight.sparsity for weight in pruned)
    return (
        f"too few zeros: the sparsest matrix has {most:.0%}, and below {LEAST_SPARSITY:.0%} dense "
        "multiplication is as fast on any hardware; prune further, or quantise instead"
    )


def _not_taken(pruned: Sequence["Weight"]) -> list[Reason]:
    """Sparse enough, but of a kind no kernel reads."""
    enough = [weight for weight in pruned if weight.sparsity >= LEAST_SPARSITY - 1e-9]
    found = []
    for why in sorted({weight.why for weight in enough if weight.why}):
        held = [weight for weight in enough if weight.why == why]
        found.append((
            "no-kernel-for-it",
            f"{len(held)} {_plural(held)} enough zeros, but no runtime here skips them: {why}",
        ))  # fmt: skip
    small = [weight for weight in enough if weight.kernel == "dense"]
    if small:
        found.append((
            "dense-is-as-fast",
            f"{len(small)} {_plural(small)} many zeros, but so few entries, or so narrowly enough "
            "zeros, that dense multiplication is as fast",
        ))  # fmt: skip
    return found


def _plural(held: Sequence[object]) -> str:
    return "matrix has" if len(held) == 1 else "matrices have"


def _runtime(
    winning: Sequence["Weight"], products: Mapping[str, Any], kernels: Mapping[str, Any]
) -> Reason:
    share = sum(weight.elements for weight in winning) / max(products["elements"], 1)
    said = (
        f"stock onnxruntime has no kernel that skips zeros: {len(winning)} of "
        f"{products['matrices']} matrices ({share:.0%} of the entries) are sparse enough to gain, "
        f"about {products['expected_gain']:.1f}x over all matrices in decoding, but only where "
        "elsa-compile's execution provider runs them"
    )
    if kernels["available"]:
        return (
            "stock-runtime",
            f"{said}; its kernels are on this machine: compare with elsa-run "
            "bench MODEL --against stock",
        )
    return "no-kernels", f"{said}, and its kernels are not on this machine: {kernels['why']}"


def _storage(pruned: Sequence["Weight"]) -> list[Reason]:
    dense = [weight for weight in pruned if weight.form == "dense"]
    coo = [weight for weight in pruned if weight.form.startswith("coo")]
    found = []
    if dense:
        found.append((
            "stored-dense",
            f"stored dense, with all their zeros: {len(dense)} of {len(pruned)} pruned matrices; "
            "that part of the file is no smaller; elsa-compile stores each weight in its smallest "
            "form",
        ))  # fmt: skip
    if coo:
        found.append((
            "expanded-at-load",
            f"stored as sparse initializers: {len(coo)} of {len(pruned)} pruned matrices; the file "
            "is smaller, but stock onnxruntime makes them dense while loading, so its speed and "
            "memory are those of dense ones",
        ))  # fmt: skip
    return found


def _dense_share(matrices: Sequence["Weight"], products: Mapping[str, Any]) -> list[Reason]:
    """Amdahl: matrices that stay dense limit what the others gain."""
    rest = [weight for weight in matrices if weight.expected_gain <= 1.0]
    elements = sum(weight.elements for weight in rest)
    if elements < _SHARE * products["elements"]:
        return []
    largest = max(rest, key=lambda weight: weight.elements)
    return [(
        "dense-rest",
        f"{elements / products['elements']:.0%} of the entries lie where zeros gain "
        f"nothing ({len(rest)} of {len(matrices)} matrices) and bound the whole; the "
        f"largest is {shown(largest.name)} with {largest.sparsity:.0%} zeros: prune or "
        "quantise it too",
    )]  # fmt: skip


def _structure(pruned: Sequence["Weight"]) -> list[Reason]:
    found = []
    dead = [weight for weight in pruned if weight.dead_rows or weight.dead_columns]
    if dead:
        units = sum(weight.dead_rows + weight.dead_columns for weight in dead)
        found.append((
            "dead-units",
            f"{units} whole rows or columns of {len(dead)} matrices are zero: taken out of the "
            "model they make it faster anywhere (elsa-compile's pass drop-dead-units)",
        ))  # fmt: skip
    halves = [weight for weight in pruned if weight.two_of_four]
    if halves:
        found.append((
            "two-of-four",
            f"{len(halves)} matrices fit 2:4, which NVIDIA GPUs execute, but only through TensorRT "
            "with trt_sparsity_enable, not through onnxruntime's CUDA provider",
        ))  # fmt: skip
    return found


def _elsewhere(weights: Sequence["Weight"]) -> list[Reason]:
    """Zeros in weights that are no matrices."""
    found = []
    for role, why in (
        ("convolution", "convolutions, for which no runtime here has sparse kernels"),
        ("lookup", "lookup tables, of which only single rows are read: no time to save"),
    ):
        held = [w for w in weights if w.role == role and w.sparsity >= _FEW]
        if held:
            zeros = sum(weight.zeros or 0 for weight in held)
            found.append((f"zeros-in-{role}", f"{zeros:,} zeros lie in {why}"))
    return found
