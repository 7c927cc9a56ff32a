"""Which weights a pass applies to: `targets` and `ignore`.

An entry is an exact weight name, the type name of the owning module (`Linear`, `Conv2d`), or
`re:` followed by a regular expression that must match the whole name.
"""

import re
from collections.abc import Iterable

from elsa_compile.errors import UserInputError
from elsa_compile.pass_base import suggestion
from elsa_compile.program import Weight


def matches(entry: str, weight: Weight) -> bool:
    """True when one entry of `targets` or `ignore` names this weight."""
    if entry.startswith("re:"):
        return any(re.fullmatch(entry[3:], name) for name in (weight.name, *weight.aliases))
    owner = weight.name.rpartition(".")[0]
    return entry in (weight.name, *weight.aliases, owner, weight.type_name)


def check_entries(where: str, entries: Iterable[str], weights: Iterable[Weight]) -> None:
    """Every entry must be a valid expression and name at least one weight.

    An entry that matches nothing is nearly always a misspelling, and pruning what the user meant to
    protect is not undone by a warning.

    Raises:
        UserInputError: names the entry, with the closest weight name.
    """
    weights = list(weights)
    for entry in entries:
        if entry.startswith("re:"):
            try:
                re.compile(entry[3:])
            except re.error as error:
                raise UserInputError(
                    f"{where}: {entry!r} is no regular expression: {error}"
                ) from None
        if not any(matches(entry, weight) for weight in weights):
            known = [w.name for w in weights] + sorted({w.type_name for w in weights})
            raise UserInputError(
                f"{where}: {entry!r} matches no weight{suggestion(entry, known)}; give a weight's "
                "name, a module type as in Linear, or re:<expression> for the whole name"
            )
