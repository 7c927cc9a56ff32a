"""Pass, the registry, and what a pass is given and gives back.

A pass is a frozen, keyword-only dataclass whose fields are its options. The same constructor serves
Python, the YAML recipe and `--set pass.option=value`, so an option is declared once, with its help
text and its range.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar, get_args, get_origin

import torch

from elsa_compile.errors import UserInputError
from elsa_compile.facts import Fact

if TYPE_CHECKING:
    from elsa_compile.data import Samples
    from elsa_compile.program import Program, Weight
    from elsa_compile.progress import ProgressSink
    from elsa_compile.runtime.decode_cost import DecodeCost

ENTRY_POINT_GROUP = "elsa_compile.passes"


def option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    below: float | None = None,
    choices: Iterable[str] | None = None,
) -> Any:
    """Declare one option of a pass.

    Args:
        default: its default; a list or dict is copied for each instance.
        help: one sentence for `--explain`.
        low: smallest legal number.
        high: largest legal number.
        below: numbers must be smaller than this.
        choices: legal strings.
    """
    bounds = {"low": low, "high": high, "below": below}
    metadata = {"help": help, "choices": tuple(choices) if choices else None, **bounds}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class PassStats:
    """What a pass did: counts for machines, notes and warnings for people, curves for the report.

    A curve is a list of (step, value).
    """

    changed: int = 0
    counts: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    curves: dict[str, list[list[float]]] = field(default_factory=dict)


class TrainingStream(Protocol):
    """Batches to train on, the same for the same seed and step.

    Attributes:
        count: windows or samples that one pass over the data gives.
        seq_len: tokens a window; None when samples are no token windows.
        key: short text that differs when the data or how it is cut differs.
    """

    @property
    def count(self) -> int: ...  # noqa: D102
    @property
    def seq_len(self) -> int | None: ...  # noqa: D102
    @property
    def key(self) -> str: ...  # noqa: D102

    def batch(self, step: int, batch_size: int) -> dict[str, "torch.Tensor"]:
        """Inputs by name, `batch_size` rows each."""

    def validation(self) -> list[dict[str, "torch.Tensor"]]:
        """Batches that `batch` never gives, to watch the training with; may be empty."""


# (tokens a window or None for the default, seed) -> stream
OpenStream = Callable[["int | None", int], TrainingStream]
MeasureDecode = Callable[["Program", int, "int | None"], "DecodeCost"]


@dataclass(frozen=True)
class Context:
    """What a pass may read besides the program.

    Attributes:
        samples: calibration or training samples, or None when the user gave none.
        device: where heavy arithmetic runs; weights come back to where they were.
        seed: of every random choice in a pass.
        progress: sink for stages, metrics and notes.
        training: opens the data as a stream for passes that train, or None when there is none.
        work: folder for snapshots, which outlive an interrupted run; None: a temporary one.
        measure_decode: (program, context, threads) -> what a token of the program costs in
            onnxruntime as it is; None where it cannot be run, in an estimate.
    """

    samples: "Samples | None"
    device: torch.device
    seed: int
    progress: "ProgressSink"
    training: OpenStream | None = None
    work: Path | None = None
    measure_decode: "MeasureDecode | None" = None

    def generator(self) -> torch.Generator:
        """A fresh CPU generator, equal for equal seeds."""
        return torch.Generator().manual_seed(self.seed)


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Base of all passes. Subclasses are frozen keyword-only dataclasses with `run`.

    Class attributes:
        name: as written in recipes.
        requires: facts that must hold before the pass.
        establishes: facts that hold after it.
        preserves: facts it keeps, if they held.
        needs_data: True when it cannot run without samples.
        trains: True when it reads the data as a stream (`Context.training`), not as samples.
        idempotent: True when running it twice equals running it once.
    """

    name: ClassVar[str]
    requires: ClassVar[frozenset[Fact]] = frozenset()
    establishes: ClassVar[frozenset[Fact]] = frozenset()
    preserves: ClassVar[frozenset[Fact]] = frozenset()
    needs_data: ClassVar[bool] = False
    trains: ClassVar[bool] = False
    idempotent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check every option against its declared type, range and choices."""
        hints = typing.get_type_hints(type(self))
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            checked = _checked(f"{self.name}: {spec.name}", value, hints[spec.name], spec.metadata)
            object.__setattr__(self, spec.name, checked)

    def check(self) -> None:
        """Refuse what can be refused before the model is loaded: a file that is not there."""

    def training_work(self, parameters: int, corpus_tokens: int, window: int) -> tuple[int, int]:
        """What `--dry-run` should expect: (tokens trained on, bytes held for it).

        Args:
            parameters: of the model.
            corpus_tokens: about how many the data has.
            window: tokens a window when the pass does not say.
        """
        return 0, 0

    def stored_bits(self, weight: "Weight", is_decoder: bool) -> tuple[int, int] | None:
        """(bits of an entry, bytes of scales) a weight will have in the file; None: no change."""
        return None

    def run(self, program: "Program", ctx: Context) -> PassStats:
        """Change the program; say what was done."""
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """All options with their values, as a recipe writes them."""
        return {spec.name: getattr(self, spec.name) for spec in dataclasses.fields(self)}


def _checked(where: str, value: Any, hint: Any, limits: Mapping[str, Any]) -> Any:
    """`value` converted to `hint` when that loses nothing, or UserInputError."""
    alternatives = (
        get_args(hint) if get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    )
    if value is None and type(None) in alternatives:
        return None
    for kind in alternatives:
        if kind is float and type(value) is int:
            value = float(value)
        origin = get_origin(kind) or kind
        if origin is not type(None) and isinstance(value, origin):
            if origin is int and isinstance(value, bool):
                continue
            if origin is list and not all(isinstance(item, str) for item in value):
                break
            _check_limits(where, value, limits)
            return value
    wanted = " or ".join(_type_word(kind) for kind in alternatives)
    raise UserInputError(f"{where} is {value!r}, wanted {wanted}")


def _type_word(kind: Any) -> str:
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    if kind is type(None):
        return "null"
    return words.get(kind) or ("a list of texts" if get_origin(kind) is list else str(kind))


def _check_limits(where: str, value: Any, limits: Mapping[str, Any]) -> None:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        low, high, below = limits.get("low"), limits.get("high"), limits.get("below")
        if value != value or (low is not None and value < low):
            raise UserInputError(f"{where} is {value:g}, wanted at least {low}")
        if high is not None and value > high:
            raise UserInputError(f"{where} is {value:g}, wanted at most {high}")
        if below is not None and value >= below:
            raise UserInputError(f"{where} is {value:g}, wanted less than {below:g}")
    choices = limits.get("choices")
    if choices and isinstance(value, str) and value not in choices:
        raise UserInputError(
            f"{where} is {value!r}, wanted one of {', '.join(choices)}{suggestion(value, choices)}"
        )


def suggestion(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest known word, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


# --- Registry -----------------------------------------------------------------------------

_REGISTRY: dict[str, type[Pass]] = {}
P = TypeVar("P", bound=type[Pass])


def register_pass(cls: P) -> P:
    """Class decorator: make a pass known under its name."""
    if not dataclasses.is_dataclass(cls) or not cls.__doc__:
        raise TypeError(f"{cls.__name__} must be a dataclass with a docstring to be registered")
    if _REGISTRY.get(cls.name, cls).__qualname__ != cls.__qualname__:
        raise TypeError(f"two passes are called {cls.name!r}: {_REGISTRY[cls.name]} and {cls}")
    _REGISTRY[cls.name] = cls
    return cls


def registered_passes() -> dict[str, type[Pass]]:
    """All passes by name: ours, then those of installed packages (entry points)."""
    import elsa_compile.passes  # noqa: F401  importing it registers ours

    _load_third_party()
    return dict(sorted(_REGISTRY.items()))


def _load_third_party() -> None:
    from importlib.metadata import entry_points

    for entry in entry_points(group=ENTRY_POINT_GROUP):
        try:
            loaded = entry.load()
        except Exception as error:  # somebody else's package: name it, whatever it raised
            raise UserInputError(
                f"the pass {entry.name!r} of the installed package "
                f"{entry.dist.name if entry.dist else entry.value} cannot be imported: {error}"
            ) from error
        if isinstance(loaded, type) and issubclass(loaded, Pass):
            register_pass(loaded)


def find_pass(name: str) -> type[Pass]:
    """The pass called `name`, or UserInputError with a suggestion."""
    known = registered_passes()
    if name not in known:
        raise UserInputError(
            f"there is no pass {name!r}{suggestion(name, known)} (--list-passes shows all)"
        )
    return known[name]


def make_pass(name: str, options: Mapping[str, Any]) -> Pass:
    """Build a pass from a recipe's entry; unknown options are errors with a suggestion."""
    cls = find_pass(name)
    known = [spec.name for spec in dataclasses.fields(cls)]
    for key in options:
        if key not in known:
            listed = ", ".join(known) or "none"
            raise UserInputError(
                f"{name} has no option {key!r}{suggestion(str(key), known)} (it has: {listed})"
            )
    return cls(**options)


def explain(cls: type[Pass]) -> str:
    """What `--explain` prints: first line, options with defaults and ranges, facts."""
    import inspect

    lines = [f"{cls.name}: {inspect.getdoc(cls)}", "", "options:"]
    hints = typing.get_type_hints(cls)
    for spec in dataclasses.fields(cls):
        default = spec.default
        if spec.default_factory is not dataclasses.MISSING:
            default = spec.default_factory()
        kind = hints[spec.name]
        shown = kind.__name__ if isinstance(kind, type) else str(kind)
        limits = _limits_text(spec.metadata)
        lines.append(f"  {spec.name}: {shown} = {default!r}{limits}")
        lines.append(f"      {spec.metadata.get('help', '')}")
    if len(lines) == 3:
        lines.append("  none")
    rows: list[tuple[str, frozenset[Fact]]] = [
        ("requires", cls.requires),
        ("establishes", cls.establishes),
        ("preserves", cls.preserves),
    ]
    lines.append("")
    for word, facts in rows:
        names = ", ".join(fact.name for fact in Fact if fact in facts) or "nothing"
        lines.append(f"{word}: {names}")
    lines.append(f"needs data: {'yes' if cls.needs_data else 'no'}")
    return "\n".join(lines)


def _limits_text(limits: Mapping[str, Any]) -> str:
    if limits.get("choices"):
        return f"  (one of {', '.join(limits['choices'])})"
    low, high, below = limits.get("low"), limits.get("high"), limits.get("below")
    parts = [f">= {low:g}" if low is not None else "", f"<= {high:g}" if high is not None else ""]
    parts.append(f"< {below:g}" if below is not None else "")
    text = ", ".join(part for part in parts if part)
    return f"  ({text})" if text else ""
