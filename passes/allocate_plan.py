"""allocate-plan: sparsity and pattern of each weight from a file that a person can edit.

elsa_plan: 1
weights:
model.layers.0.mlp.up_proj.weight: {shape: [384, 128], sparsity: 0.8, pattern: unstructured}
lm_head.weight: {shape: [1024, 128], skip: the output head}
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from elsa_compile.errors import UserInputError
from elsa_compile.facts import Fact
from elsa_compile.pass_base import Context, Pass, PassStats, option, register_pass, suggestion
from elsa_compile.patterns import parse_pattern
from elsa_compile.program import Program, Weight, WeightPlan
from elsa_compile.recipe import dump_yaml, load_yaml, read_text_file

FORMAT = 1
_KEYS = ("shape", "sparsity", "pattern", "skip")


def plan_to_yaml(program: Program) -> str:
    """The plan of a program as the text that `read_plan` reads back."""
    rows: dict[str, Any] = {}
    for name, plan in program.plans.items():
        if name not in program.prunable:  # it is there for its quantisation grid
            continue
        row: dict[str, Any] = {"shape": list(plan.shape)}
        if plan.skipped is not None:
            row["skip"] = plan.skipped
        else:
            row |= {"sparsity": plan.sparsity, "pattern": str(plan.pattern)}
        rows[name] = row
    return dump_yaml({"elsa_plan": FORMAT, "weights": rows})


def read_plan(text: str, where: str, weights: dict[str, Weight]) -> dict[str, WeightPlan]:
    """Plans for exactly the given weights from YAML text.

    Raises:
        UserInputError: an unknown or missing weight, a shape that differs, a value out of range.
    """
    content = load_yaml(text, where)
    if not isinstance(content, dict) or content.get("elsa_plan") != FORMAT:
        raise UserInputError(f"{where}: wanted a mapping with elsa_plan: {FORMAT} and weights")
    for key in content:
        if key not in ("elsa_plan", "weights"):
            hint = suggestion(str(key), ("elsa_plan", "weights"))
            raise UserInputError(f"{where}: unknown key {key!r}{hint}")
    rows = content.get("weights")
    if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
        raise UserInputError(f"{where}: weights must map each weight's name to its choices")
    for name in rows:
        if name not in weights:
            raise UserInputError(
                f"{where}: the model has no prunable weight {name!r}"
                f"{suggestion(str(name), weights)}"
            )
    missing = [name for name in weights if name not in rows]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserInputError(
            f"{where}: nothing is said about {missing[0]}{more}; write `skip: <why>` to leave a "
            "weight dense"
        )
    return {name: _read_row(f"{where}: {name}", rows[name], weights[name]) for name in weights}


def _read_row(where: str, row: dict[Any, Any], weight: Weight) -> WeightPlan:
    for key in row:
        if key not in _KEYS:
            raise UserInputError(f"{where}: unknown key {key!r}{suggestion(str(key), _KEYS)}")
    shape = weight.matrix_shape
    if "shape" in row and row["shape"] != list(shape):
        raise UserInputError(f"{where} has shape {list(shape)}, but the plan says {row['shape']}")
    if "skip" in row:
        if "sparsity" in row or "pattern" in row:
            raise UserInputError(f"{where}: skip and sparsity exclude each other")
        return WeightPlan(shape, skipped=str(row["skip"]))
    sparsity: Any = row.get("sparsity")
    is_number = isinstance(sparsity, (int, float)) and not isinstance(sparsity, bool)
    if not is_number or not 0.0 <= sparsity < 1.0:
        raise UserInputError(f"{where}: sparsity is {sparsity!r}, wanted a number in [0, 1)")
    pattern = parse_pattern(row.get("pattern", "unstructured"))
    problem = pattern.problem(shape)
    if problem is not None:
        raise UserInputError(f"{where} {problem}")
    implied = pattern.implied_sparsity()
    if implied is not None and abs(sparsity - implied) > 1e-9:
        raise UserInputError(
            f"{where}: pattern {pattern} gives sparsity {implied:g}, not {sparsity}"
        )
    return WeightPlan(shape, float(sparsity), pattern)


@register_pass
@dataclass(frozen=True, kw_only=True)
class AllocatePlan(Pass):
    """Take each weight's sparsity and pattern from a plan file.

    Every compilation writes one, `elsa_plan.yaml`, beside its output: edit it and give it back.
    """

    name: ClassVar[str] = "allocate-plan"
    establishes: ClassVar[frozenset[Fact]] = frozenset({Fact.PLANNED})
    preserves: ClassVar[frozenset[Fact]] = frozenset({Fact.SHAPES, Fact.EXPORTABLE})

    path: str = option("elsa_plan.yaml", "the plan file")

    def check(self) -> None:
        """The file must be there and be YAML."""
        load_yaml(read_text_file(Path(self.path), "plan"), self.path)

    def run(self, program: Program, ctx: Context) -> PassStats:
        """Replace all plans by those of the file."""
        text = read_text_file(Path(self.path), "plan")
        plans = read_plan(text, f"{self.name}: {self.path}", program.prunable)
        changed = sum(plans[name] != program.plans.get(name) for name in plans)
        program.plans.clear()
        program.plans.update(plans)
        planned = sum(plan.skipped is None for plan in plans.values())
        counts: dict[str, float] = {"planned": planned, "skipped": len(plans) - planned}
        return PassStats(changed=changed, counts=counts)
