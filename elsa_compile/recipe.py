"""Recipe: an ordered list of passes, and its strict YAML form.

    elsa_recipe: 1
    passes:
      - allocate-uniform: {sparsity: 0.5, pattern: "2:4"}
      - prune-wanda

Unknown keys, unknown passes and options, and duplicate keys are errors. Numbers are read as people
write them: `2e-3` is a number and `2:4` is text, both against YAML 1.1.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from elsa_compile.errors import UserInputError
from elsa_compile.pass_base import Pass, make_pass, suggestion

FORMAT = 1


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and aliases and reads numbers as YAML 1.2 does."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuse aliases: ten lists of ten of the one before make a billion from ten lines."""
        if self.check_event(yaml.AliasEvent):
            line = self.peek_event().start_mark.line + 1  # type: ignore[no-untyped-call]
            raise UserInputError(f"line {line}: an alias (*name); write the value out")
        return super().compose_node(parent, index)


def _mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if not isinstance(key, (str, int)):
            raise UserInputError(f"line {key_node.start_mark.line + 1}: the key {key!r} is no text")
        if key in seen:
            raise UserInputError(f"line {key_node.start_mark.line + 1}: duplicate key {key!r}")
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if not tag.endswith((":float", ":int"))]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789")
)
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|nan)$"),
    list("-+0123456789."),
)
_StrictLoader.add_constructor(
    # YAML 1.1 takes 010 for eight.
    "tag:yaml.org,2002:int",
    lambda loader, node: int(loader.construct_scalar(node)),  # type: ignore[arg-type]
)


class _StrictDumper(yaml.SafeDumper):
    """SafeDumper whose output both our loader and YAML 1.1 loaders read alike."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write out what two options share."""
        return True


def _dump_float(dumper: yaml.SafeDumper, value: float) -> yaml.ScalarNode:
    text = repr(value)
    if "e" in text and "." not in text:  # YAML 1.1 reads 2e-05 as text
        text = text.replace("e", ".0e")
    return dumper.represent_scalar("tag:yaml.org,2002:float", text)


_StrictDumper.add_representer(float, _dump_float)
# Text that either reader would take for a number must be quoted.
_StrictDumper.yaml_implicit_resolvers = {
    first: [
        *yaml.SafeDumper.yaml_implicit_resolvers.get(first, []),
        *_StrictLoader.yaml_implicit_resolvers.get(first, []),
    ]
    for first in {
        **yaml.SafeDumper.yaml_implicit_resolvers,
        **_StrictLoader.yaml_implicit_resolvers,
    }
}


def load_yaml(text: str, where: str) -> Any:
    """Parse YAML strictly; every failure is a UserInputError that starts with `where`."""
    try:
        return yaml.load(text, _StrictLoader)  # noqa: S506  a SafeLoader subclass
    except UserInputError as error:
        raise UserInputError(f"{where}: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserInputError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def dump_yaml(value: Any) -> str:
    """YAML text that `load_yaml` reads back to an equal value."""
    return yaml.dump(value, Dumper=_StrictDumper, sort_keys=False, width=100)


def read_text_file(path: Path, what: str) -> str:
    """Text of a small UTF-8 file, or UserInputError."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserInputError(f"{what} {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserInputError(f"{what} {path} cannot be read: {error}") from None


@dataclass(frozen=True)
class Recipe:
    """An ordered, checked list of passes."""

    passes: tuple[Pass, ...]

    @staticmethod
    def parse(text: str, where: str = "recipe") -> "Recipe":
        """Read a recipe's YAML text."""
        content = load_yaml(text, where)
        if not isinstance(content, dict):
            raise UserInputError(f"{where}: wanted a mapping with elsa_recipe and passes")
        for key in content:
            if key not in ("elsa_recipe", "passes"):
                hint = suggestion(str(key), ("elsa_recipe", "passes"))
                raise UserInputError(f"{where}: unknown key {key!r}{hint}")
        if content.get("elsa_recipe") != FORMAT:
            raise UserInputError(
                f"{where}: elsa_recipe is {content.get('elsa_recipe')!r}, "
                f"this release reads format {FORMAT}"
            )
        entries = content.get("passes")
        if not isinstance(entries, list):
            raise UserInputError(f"{where}: passes must be a list")
        try:
            return Recipe(tuple(make_pass(*_entry(entry)) for entry in entries))
        except UserInputError as error:
            raise UserInputError(f"{where}: {error}") from None

    @staticmethod
    def load(path: Path) -> "Recipe":
        """Read a recipe file."""
        return Recipe.parse(read_text_file(path, "recipe"), str(path))

    @staticmethod
    def preset(name: str) -> "Recipe":
        """A recipe that ships with the compiler."""
        known = preset_names()
        if name not in known:
            raise UserInputError(
                f"there is no preset {name!r}{suggestion(name, known)} (there are: "
                f"{', '.join(known)})"
            )
        text = (resources.files("elsa_compile") / "recipes" / f"{name}.yaml").read_text("utf-8")
        return Recipe.parse(text, f"preset {name}")

    def to_yaml(self) -> str:
        """The resolved recipe: every option written out. Loads back to equal passes."""
        entries = [{p.name: p.options()} if p.options() else p.name for p in self.passes]
        return dump_yaml({"elsa_recipe": FORMAT, "passes": entries})

    def entries(self) -> list[dict[str, Any]]:
        """The resolved recipe as plain data."""
        return [{"pass": p.name, **p.options()} for p in self.passes]

    def with_options(self, name: str, options: Mapping[str, Any]) -> "Recipe":
        """A copy in which every pass called `name` has these options set."""
        if not any(p.name == name for p in self.passes):
            inside = [p.name for p in self.passes]
            raise UserInputError(
                f"the recipe has no pass {name!r}{suggestion(name, inside)} (it has: "
                f"{', '.join(inside) or 'none'})"
            )
        changed = [
            make_pass(name, {**p.options(), **options}) if p.name == name else p
            for p in self.passes
        ]
        return replace(self, passes=tuple(changed))

    def with_settings(self, settings: Iterable[str]) -> "Recipe":
        """Apply `--set pass.option=value` texts; values are read as YAML."""
        recipe = self
        for setting in settings:
            match = re.fullmatch(r"([\w-]+)\.(\w+)=(.*)", setting, re.DOTALL)
            if match is None:
                raise UserInputError(
                    f"--set {setting!r} is not of the form pass.option=value, "
                    "as in prune-sparsegpt.damping=0.05"
                )
            name, key, text = match.groups()
            recipe = recipe.with_options(name, {key: load_yaml(text, f"--set {name}.{key}")})
        return recipe

    def with_sparsity(self, sparsity: float) -> "Recipe":
        """A copy whose allocation aims at `sparsity`."""
        names = [p.name for p in self.passes if "sparsity" in p.options()]
        if not names:
            raise UserInputError("--sparsity: the recipe has no pass with an option 'sparsity'")
        recipe = self
        for name in dict.fromkeys(names):
            recipe = recipe.with_options(name, {"sparsity": sparsity})
        return recipe

    def with_quantization(self, kind: str, has_data: bool = False) -> "Recipe":
        """A copy that quantises last, to "int8" or to "int4" in groups of 32; head: int8.

        With data, int4 is compensated: on a pruned model rounding alone costs three times as much
        (docs/results/smollm2-trained.md). A recipe that has quantize-weights already gets only its
        `bits` changed.
        """
        if any(p.name == "quantize-weights" for p in self.passes):
            return self.with_options("quantize-weights", {"bits": kind})
        options: dict[str, Any] = {"bits": kind}
        if kind == "int4":
            options |= {"group_size": 32, "method": "compensated" if has_data else "rtn"}
        return replace(self, passes=(*self.passes, make_pass("quantize-weights", options)))

    def with_plan(self, path: Path) -> "Recipe":
        """A copy in which the plan file replaces the passes that allocate."""
        planner = make_pass("allocate-plan", {"path": str(path)})
        rest = [p for p in self.passes if not p.name.startswith("allocate-")]
        return replace(self, passes=(planner, *rest))


def _entry(entry: Any) -> tuple[str, Mapping[str, Any]]:
    """One item of `passes`: `name`, `{name: null}` or `{name: {option: value}}`."""
    if isinstance(entry, str):
        return entry, {}
    if isinstance(entry, dict) and len(entry) == 1:
        name, options = next(iter(entry.items()))
        if options is None:
            return str(name), {}
        if isinstance(options, dict):
            return str(name), {str(key): value for key, value in options.items()}
    raise UserInputError(
        f"the entry {entry!r} of passes is neither a name nor a name with its options, "
        "as in `- prune-wanda: {}`"
    )


def preset_names() -> list[str]:
    """Names of the recipes that ship with the compiler."""
    files = (resources.files("elsa_compile") / "recipes").iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))
