"""Recipes: strict YAML, resolved options, settings, presets."""

import pytest

from elsa_compile.errors import UserInputError
from elsa_compile.pass_base import make_pass
from elsa_compile.recipe import Recipe, dump_yaml, load_yaml, preset_names


def test_every_preset_loads_and_resolves_to_itself():
    assert {"alps", "magnitude", "sparsegpt", "wanda"} <= set(preset_names())
    for name in preset_names():
        recipe = Recipe.preset(name)
        assert Recipe.parse(recipe.to_yaml()) == recipe


def test_every_option_is_written_out():
    text = Recipe.preset("sparsegpt").to_yaml()
    assert "damping: 0.01" in text
    assert "block_size: 128" in text


@pytest.mark.parametrize(
    ("text", "value"),
    [("2e-3", 0.002), ("1e5", 1e5), ("2:4", "2:4"), ("010", 10), ("0.5", 0.5), ("no", False),
     ("1:30", "1:30"), (".inf", float("inf"))],
)  # fmt: skip
def test_numbers_are_read_as_people_write_them(text, value):
    found = load_yaml(f"x: {text}", "here")["x"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("value", [2e-05, 1e22, 0.1, -3.0, 5, "2:4", "1e3", None, True, ["a"]])
def test_what_is_dumped_loads_back(value):
    assert load_yaml(dump_yaml({"x": value}), "here") == {"x": value}


def test_a_duplicate_key_names_its_line():
    with pytest.raises(UserInputError, match="here: line 3: duplicate key 'a'"):
        load_yaml("a: 1\nb: 2\na: 3\n", "here")


def test_tags_run_nothing():
    with pytest.raises(UserInputError, match="not valid YAML"):
        load_yaml("x: !!python/object/apply:os.system [echo]", "here")


def test_settings_reach_the_pass():
    recipe = Recipe.preset("sparsegpt").with_settings(
        ["prune-sparsegpt.damping=2e-2", "allocate-uniform.pattern=2:4"]
    )
    options = {p.name: p.options() for p in recipe.passes}
    assert options["prune-sparsegpt"]["damping"] == 0.02
    assert options["allocate-uniform"]["pattern"] == "2:4"


def test_sparsity_reaches_the_allocation():
    recipe = Recipe.preset("wanda").with_sparsity(0.9)
    assert recipe.passes[0].options()["sparsity"] == 0.9
    assert recipe.passes[0].options()["pattern"] == "row"


def test_quantisation_comes_last_and_can_be_set_further():
    recipe = Recipe.preset("magnitude").with_quantization("int4")
    assert [p.name for p in recipe.passes][-2:] == ["fold-constants", "quantize-weights"]
    recipe = recipe.with_settings(["quantize-weights.group_size=64"]).with_quantization("int8")
    assert [p.name for p in recipe.passes].count("quantize-weights") == 1
    assert recipe.passes[-1].options()["bits"] == "int8"
    assert recipe.passes[-1].options()["group_size"] == 64
    with pytest.raises(UserInputError, match="bits is 'int2', wanted one of int8, int4"):
        recipe.with_quantization("int2")


def test_int4_is_compensated_where_there_are_data():
    def method(kind: str, has_data: bool) -> object:
        recipe = Recipe.preset("magnitude").with_quantization(kind, has_data)
        return recipe.passes[-1].options()["method"]

    assert method("int4", True) == "compensated"
    assert method("int4", False) == "rtn"
    assert method("int8", True) == "rtn"


def test_a_plan_replaces_the_allocation(tmp_path):
    recipe = Recipe.preset("magnitude").with_plan(tmp_path / "p.yaml")
    assert [p.name for p in recipe.passes] == ["allocate-plan", "prune-magnitude", "fold-constants"]


def test_a_sparsity_that_contradicts_its_pattern_is_refused_at_once():
    with pytest.raises(UserInputError, match="contradicts pattern 2:4"):
        make_pass("allocate-uniform", {"sparsity": 0.8, "pattern": "2:4"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples is 0, wanted at least 1"),
        ({"samples": 2.5}, "wanted a whole number"),
        ({"samples": True}, "wanted a whole number"),
        ({"damping": "much"}, "wanted a number"),
        ({"damping": 11}, "wanted at most 10"),
    ],
)
def test_options_are_checked_by_type_and_range(options, message):
    with pytest.raises(UserInputError, match=message):
        make_pass("prune-sparsegpt", options)


def test_a_value_that_two_options_share_is_written_out():
    shared = ["re:.*"]
    text = dump_yaml({"targets": shared, "ignore": shared})
    assert load_yaml(text, "here") == {"targets": shared, "ignore": shared}
