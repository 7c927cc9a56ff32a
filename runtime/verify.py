"""Checks that a compiled file is sound and computes what its source computed.

In order: its structure (`onnx_file`), that onnxruntime loads it, that its scores are finite, that
the KV cache agrees with a run without one, that a batch agrees with single rows (left padding
included), and the reference answers recorded in elsa_report.json beside it (`probe`). Where weights
are quantised, onnxruntime by default rounds activations to int8 in their products: the checks are
made without that, and a last one tries each product as it is by default (`rounded_products`) and
says how far the scores are from exact ones.
"""

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elsa_compile.runtime.decoder import Decoder
from elsa_compile.runtime.errors import ElsaError, UserInputError, VerificationError
from elsa_compile.runtime.onnx_file import ModelFile, Value, inspect
from elsa_compile.runtime.probe import compare, made_up, prompt_tokens
from elsa_compile.runtime.rounded_products import try_products
from elsa_compile.runtime.session import EXACT, provider_of, run_failure, session
from elsa_compile.runtime.text import read_json

REPORT = "elsa_report.json"
# Largest |difference| relative to max(1, largest |logit|) between two orders of the same sums.
_TOLERANCE = {"tensor(float16)": 2e-2}
_TOLERANCE_FP32 = 1e-4
_LENGTH = 12
_UNKNOWN_VOCAB = 16  # tokens surely inside any vocabulary


@dataclass(frozen=True)
class Check:
    """One check. `ok` is None when it does not apply; `detail` is for people."""

    name: str
    ok: bool | None
    detail: str
    difference: float | None = None
    tolerance: float | None = None


@dataclass
class Verification:
    """What was checked of a file, in order."""

    model: ModelFile
    provider: str
    checks: list[Check] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """True when no check failed."""
        return all(check.ok is not False for check in self.checks)

    def raise_if_failed(self) -> None:
        """Turn the first failed check into an error.

        Raises:
            VerificationError: with what was found and wanted.
        """
        for check in self.checks:
            if check.ok is False:
                raise VerificationError(f"{self.model.path}: {check.name}: {check.detail}")

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "model": str(self.model.path),
            "ok": self.ok,
            "kind": self.model.kind,
            "layers": self.model.layers,
            "provider": self.provider,
            "file_bytes": self.model.file_bytes,
            "external_bytes": self.model.external_bytes,
            "weights": self.model.totals(),
            "checks": [asdict(check) for check in self.checks],
        }


def verify(
    path: str | Path,
    *,
    provider: str = "auto",
    threads: int | None = None,
    tolerance: float | None = None,
) -> Verification:
    """Run every check that applies.

    Args:
        path: the .onnx file or its folder.
        provider: as in `session`.
        threads: as in `session`.
        tolerance: of the cache and batch checks; None takes 1e-4, for float16 models 2e-2.

    Returns:
        The checks; a failed one does not raise (`Verification.raise_if_failed`).

    Raises:
        UserInputError: malformed, or refused by onnxruntime.
        UnsupportedModelError: a language model with inputs this release cannot feed.
    """
    model = inspect(path, count_zero=True)
    started = time.perf_counter()
    quantised = "DequantizeLinear" in model.nodes
    # The file is checked by itself, in a stock onnxruntime, without kernels of ours.
    exact = EXACT if quantised else None
    opened = session(model.path, threads, provider, model, exact, kernels=False)
    seconds = time.perf_counter() - started
    result = Verification(model, provider_of(opened))
    result.checks.append(Check("structure", True, _structure(model)))
    result.checks.append(Check("loads", True, f"on {result.provider} in {seconds:.2f} s"))

    def run(feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        try:
            values = opened.run(None, feeds)
        except Exception as error:
            raise run_failure(error, model.path) from None
        return dict(zip([o.name for o in opened.get_outputs()], values, strict=True))

    decoder = None if model.kind == "generic" else Decoder(opened, model.path)
    if decoder is None:
        result.checks.append(_guarded("finite", lambda: _check_made_up(model, run)))
    else:
        result.checks += _check_language(decoder, tolerance)
    result.checks.append(_guarded("reference", lambda: _check_reference(model, decoder, run)))
    if quantised:

        def rounded() -> Check:
            stock = session(model.path, threads, provider, model, kernels=False)
            far = _rounding(model, opened, stock)
            return _check_products(model, threads, provider, far)

        result.checks.append(_guarded("activations", rounded))
    return result


def _guarded(name: str, check: Any) -> Check:
    """A check whose own failure to run is its result."""
    try:
        made: Check = check()
    except ElsaError as error:
        return Check(name, False, str(error))
    return made


def _structure(model: ModelFile) -> str:
    """What the file holds, in a line."""
    totals = model.totals()
    elements = sum(row["elements"] for row in totals.values())
    zeros = sum(row["zeros"] for row in totals.values())
    forms = ", ".join(f"{row['weights']} {form}" for form, row in totals.items()) or "no"
    return f"{forms} weights, {zeros / max(elements, 1):.1%} of {elements:,} elements are zero"


def _check_made_up(model: ModelFile, run: Any) -> Check:
    """A generic model on inputs that only its declared shapes know."""
    try:
        feeds = {v.name: made_up(v.dtype, _shape(v), 0, v.name) for v in model.inputs}
        outputs = run(feeds)
    except ElsaError as error:
        # Whether such inputs make sense to the model, its declaration does not say.
        return Check("finite", None, f"made-up inputs do not fit it: {error}")
    bad = [n for n, v in outputs.items() if v.dtype.kind == "f" and not np.isfinite(v).all()]
    if bad:
        return Check("finite", False, f"output {bad[0]!r} holds NaN or infinity on made-up inputs")
    return Check("finite", True, f"{len(outputs)} outputs on made-up inputs")


def _shape(value: Value) -> list[int]:
    """A declared shape with 2 for a free batch and 8 for any other free dimension."""
    return [d if isinstance(d, int) else (2 if a == 0 else 8) for a, d in enumerate(value.shape)]


def _check_language(decoder: Decoder, tolerance: float | None) -> list[Check]:
    """Finite scores, cache against no cache, batch against rows."""
    kind = next(o.type for o in decoder.session.get_outputs() if o.name == "logits")
    limit = tolerance if tolerance is not None else _TOLERANCE.get(kind, _TOLERANCE_FP32)
    rows = decoder.batch or 1
    length = decoder.length or _LENGTH
    ids = prompt_tokens(decoder.vocab_size or _UNKNOWN_VOCAB, max(rows, 3), length)

    def finite() -> Check:
        scores = decoder.extend(decoder.start(rows), ids[:rows])
        if not np.isfinite(scores).all():
            return Check("finite", False, "scores hold NaN or infinity")
        return Check("finite", True, f"scores of {length} tokens")

    first = _guarded("finite", finite)
    if first.ok is not True:
        return [first]
    return [
        first,
        _guarded("cache", lambda: _check_steps(decoder, ids[:rows], limit)),
        _guarded("batch", lambda: _check_batch(decoder, ids, limit)),
    ]


def _difference(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """Largest difference over max(1, largest |wanted|)."""
    wanted = wanted.astype(np.float64)
    worst = float(np.abs(found.astype(np.float64) - wanted).max())
    return worst / max(1.0, float(np.abs(wanted).max()))


def _judged(name: str, what: str, difference: float, limit: float) -> Check:
    ok = difference <= limit  # False for NaN
    detail = f"{what}: largest difference {difference:.1e} (at most {limit:.0e})"
    return Check(name, ok, detail, difference, limit)


def _check_products(model: ModelFile, threads: int | None, provider: str, far: str | None) -> Check:
    """Each product of a quantised weight by onnxruntime's default, and what that does to scores."""
    found = try_products(model, threads, provider)
    rest = f"; {found.left} not tried" if found.left else ""
    if not found.tried:
        return Check("activations", None, f"no product of a quantised matrix{rest}")
    detail = (
        f"{found.products} products with onnxruntime's int8 activations: {found.tried} tried, one "
        f"of a kind, off by {found.worst:.2f} of what rounding may do at most{rest}"
    )
    if not found.worst <= 1:
        detail = (
            f"product {found.where!r} with onnxruntime's int8 activations is off by "
            f"{found.worst:.2g} times what rounding may do; try another onnxruntime, and report it"
        )
    if far is not None:
        detail += f"; {far}"
    return Check("activations", found.worst <= 1, detail, found.worst, 1.0)


def _rounding(model: ModelFile, exact: Any, stock: Any) -> str | None:
    """How far outputs are from exact ones by default, for people: no bound on it is known.

    It depends on what the scores mean: root mean square 0.09 of a language model at 70 % zeros, 0.4
    and more of one that was pruned to nonsense, both exported faithfully.

    Raises:
        ElsaError: it does not run, or an output is not finite.
    """
    outputs = []
    for opened in (exact, stock):
        if model.kind != "generic":
            decoder = Decoder(opened, model.path)
            length, rows = decoder.length or _LENGTH, decoder.batch or 1
            ids = prompt_tokens(decoder.vocab_size or _UNKNOWN_VOCAB, rows, length)
            outputs.append([decoder.extend(decoder.start(rows), ids)])
            continue
        try:
            feeds = {v.name: made_up(v.dtype, _shape(v), 0, v.name) for v in model.inputs}
            outputs.append(opened.run(None, feeds))
        except Exception:  # "finite" has said that made-up inputs do not fit it
            return None
    pairs = [(a, b) for a, b in zip(*outputs, strict=True) if a.dtype.kind == "f" and a.size]
    if not pairs:
        return None
    difference = max(_relative_rms(b, a) for a, b in pairs)
    if not np.isfinite(difference):
        raise VerificationError("with onnxruntime's int8 activations an output is not finite")
    return f"together they move the outputs by {difference:.1e}, root mean square"


def _relative_rms(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    """||found - wanted|| / ||wanted||; infinite when a number is not finite."""
    gap = np.linalg.norm((found.astype(np.float64) - wanted.astype(np.float64)).ravel())
    size = np.linalg.norm(wanted.astype(np.float64).ravel())
    return float(gap / max(size, 1e-12)) if np.isfinite(gap) else float("inf")


def _check_steps(decoder: Decoder, ids: NDArray[np.int64], limit: float) -> Check:
    """Some tokens at once and then one by one give what all at once give."""
    if decoder.length is not None:
        return Check("cache", None, f"the graph takes only {decoder.length} tokens at once")
    whole = decoder.extend(decoder.start(len(ids)), ids)
    state, head = decoder.start(len(ids)), ids.shape[1] // 2 - 1
    pieces = [decoder.extend(state, ids[:, :head])]
    pieces += [decoder.extend(state, ids[:, t : t + 1]) for t in range(head, ids.shape[1])]
    difference = _difference(np.concatenate(pieces, axis=1), whole)
    tail = ids.shape[1] - head
    what = f"{ids.shape[1]} tokens = {head} and {tail} steps"
    return _judged("cache", what if decoder.cached else f"{what} (no cache)", difference, limit)


def _check_batch(decoder: Decoder, ids: NDArray[np.int64], limit: float) -> Check:
    """Three rows together give what each gives alone; the last one left-padded if possible."""
    if decoder.batch is not None:
        return Check("batch", None, f"the graph takes only batches of {decoder.batch}")
    masked = any(value.name == "attention_mask" for value in decoder.session.get_inputs())
    pad = ids.shape[1] // 3 if masked and decoder.length is None else 0
    mask = np.ones_like(ids)
    mask[-1, :pad] = 0
    together = decoder.extend(decoder.start(len(ids)), ids, mask)
    worst = 0.0
    for row in range(len(ids)):
        skipped = pad if row == len(ids) - 1 else 0
        alone = decoder.extend(decoder.start(), ids[row : row + 1, skipped:])
        worst = max(worst, _difference(together[row : row + 1, skipped:], alone))
    what = f"{len(ids)} rows{', one left-padded,' if pad else ''} = each alone"
    return _judged("batch", what, worst, limit)


def _check_reference(model: ModelFile, decoder: Decoder | None, run: Any) -> Check:
    """The answers recorded beside the file, when they are of this file."""
    folder = model.path.parent
    probe = read_json(folder / REPORT).get("probe")
    if probe is None:
        return Check("reference", None, f"no reference answers ({REPORT}) beside the model")
    if not isinstance(probe, dict):
        raise UserInputError(f"{folder / REPORT}: its probe is not an object; compile again")
    if probe.get("file") not in (None, model.path.name):
        return Check(
            "reference", None, f"{REPORT} is about {str(probe.get('file'))!r}, another file"
        )
    difference, limit, faults = compare(probe, decoder, run)
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        return Check("reference", False, faults[0] + more, difference, limit)
    what = "scores and greedy tokens as recorded" if decoder else "outputs as recorded"
    return _judged("reference", what, difference, limit)
