"""merge-parallel-linears: one product in the file, the same numbers, the program untouched."""

import copy
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import elsa_compile
from elsa_compile import frontend
from elsa_compile.export import _names_in_graph, _quantised, export, to_ir
from elsa_compile.onnx_merge import merged_name
from elsa_compile.passes import (
    AllocateUniform,
    MergeParallelLinears,
    PruneMagnitude,
    QuantizeWeights,
)
from elsa_compile.recipe import Recipe
from elsa_compile.runtime.session import EXACT, session
from elsa_compile.verify_export import check_logits
from elsa_compile.write_onnx import write_onnx

FORMS = {
    "float": (),
    "int8": (QuantizeWeights(),),
    "int4": (QuantizeWeights(bits="int4", group_size=16),),
}


def run(path, feeds):
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(*next(iter(EXACT.items())))
    opened = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return opened.run(None, feeds)


@pytest.mark.parametrize(
    ("family", "form", "groups", "parts"),
    [
        ("llama", "float", 4, 10),
        ("llama", "int8", 4, 10),
        ("llama", "int4", 4, 10),
        ("opt", "int8", 2, 6),
    ],
)
def test_the_file_has_fewer_products_and_computes_the_same(
    make_family, family, form, groups, parts, tmp_path
):
    model = make_family(family)
    torch.manual_seed(1)
    with torch.no_grad():  # biases that differ from layer to layer and from zero
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    program = frontend.from_module(model)
    passes = (AllocateUniform(sparsity=0.8), PruneMagnitude(), *FORMS[form])
    elsa_compile.apply(program, *passes)
    values = {name: weight.parameter.clone() for name, weight in program.weights.items()}
    text = program.to_text()
    elsa_compile.apply(program, MergeParallelLinears())
    stats = program.history[-1].stats
    assert (stats.counts["merged"], stats.counts["layers"]) == (groups, parts)
    assert program.to_text() == text
    assert all(torch.equal(w.parameter, values[n]) for n, w in program.weights.items())
    graph, names = to_ir(program), _names_in_graph(program)
    apart, result = (
        write_onnx(graph, tmp_path / f"{kind}.onnx", expected_weights=names,
                   quantised=_quantised(program), parallel=which)
        for kind, which in (("apart", ()), ("merged", program.parallel))
    )  # fmt: skip
    assert [len(result.merged), sum(map(len, result.merged.values()))] == [groups, parts]
    counts = [Counter(n.op_type for n in onnx.load(tmp_path / f"{kind}.onnx").graph.node)
              for kind in ("apart", "merged")]  # fmt: skip
    assert counts[0]["MatMul"] - counts[1]["MatMul"] == parts - groups
    assert counts[1]["Split"] - counts[0]["Split"] == groups
    check = check_logits(program, session(tmp_path / "merged.onnx", 1, "cpu", config=EXACT))
    assert check.ok, check.detail
    assert check.difference < 1e-5
    # The same entries, so the same number of nonzeros, and about the same size.
    nonzeros = [sum(r.nonzeros for r in each.records if r.float_bytes != 0 and len(r.shape) == 2)
                for each in (apart, result)]  # fmt: skip
    assert nonzeros[0] == nonzeros[1]
    assert result.model_bytes < 1.02 * apart.model_bytes


@pytest.mark.parametrize(("family", "groups"), [("qwen2", 4), ("gpt2", 0), ("phi3", 0)])
def test_fused_layers_are_left_as_they_are(make_family, family, groups):
    program = frontend.from_module(make_family(family))
    elsa_compile.apply(program, MergeParallelLinears())
    assert len(program.parallel) == groups


class Branches(nn.Module):
    """Five layers on one input: two with a bias, one tied to another use, one behind a ReLU."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(24, 32), nn.Linear(24, 40, bias=False)
        self.c, self.tied = nn.Linear(24, 48), nn.Linear(24, 24, bias=False)
        self.later = nn.Linear(24, 32)

    def forward(self, x):
        y = self.tied(x)
        return self.a(x), self.b(x), self.c(x).relu(), self.tied(y), self.later(x.relu())


@pytest.fixture
def branches():
    torch.manual_seed(0)
    model = Branches().eval()
    return frontend.from_module(model, (torch.randn(3, 24),))


def test_biases_are_joined_and_what_cannot_merge_is_said(branches, tmp_path):
    x = torch.randn(3, 24)
    wanted = [value.numpy() for value in branches.run(x)]
    elsa_compile.apply(branches, MergeParallelLinears())
    assert branches.parallel == [("a.weight", "b.weight", "c.weight")]
    assert branches.history[-1].stats.notes == ["tied.weight stays apart: several products read it"]
    export(branches, tmp_path / "model.onnx")
    found = run(tmp_path / "model.onnx", {branches.signature.input_names[0]: x.numpy()})
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    graph = onnx.load(tmp_path / "model.onnx").graph
    shapes = {t.name: list(t.dims) for t in graph.initializer}
    assert shapes["a+b+c.weight"] == [24, 120]
    assert not {"a.weight", "b.weight", "c.weight", "a.bias", "c.bias"} & set(shapes)


def test_differently_quantised_layers_stay_apart(branches, tmp_path):
    rule = QuantizeWeights(targets=["a.weight", "c.weight"])
    elsa_compile.apply(branches, rule, MergeParallelLinears())
    assert branches.parallel == [("a.weight", "c.weight")]
    notes = branches.history[-1].stats.notes
    assert "only what is stored alike is merged: int8: a.weight, c.weight; float: b.weight" in notes
    # The mark was made before the weights got their grids: the exporter looks again, and says so.
    branches.parallel = [("a.weight", "b.weight")]
    result = export(branches, tmp_path / "model.onnx")
    assert not result.merged
    assert "a+b.weight: not merged, its parts are quantised differently" in result.notes[0]


def test_what_is_ignored_or_gone_stays_apart(branches, tmp_path):
    elsa_compile.apply(branches, MergeParallelLinears(ignore=["b.weight"]))
    assert branches.parallel == [("a.weight", "c.weight")]
    with pytest.raises(elsa_compile.ElsaError, match="'bb' matches no weight"):
        elsa_compile.apply(branches, MergeParallelLinears(ignore=["bb"]))
    branches.parallel = [("a.weight", "later.weight")]
    result = export(branches, tmp_path / "model.onnx")
    assert "its parts read different values of the exported graph" in result.notes[0]


def test_the_report_has_a_row_for_every_part(llama_folder, tmp_path):
    passes = (QuantizeWeights(), MergeParallelLinears())
    result = elsa_compile.compile(llama_folder, tmp_path / "model.onnx", Recipe(passes))
    rows = {row["name"]: row for row in result.report.weights}
    assert result.report.verification["ok"]
    assert len(result.report.bytes["merged"]) == 4
    for parts in result.report.bytes["merged"].values():
        for part in parts:
            assert rows[part]["dtype"] == "int8"
            entries = int(np.prod(rows[part]["shape"]))
            assert entries < rows[part]["bytes"] < 1.5 * entries
            assert rows[part]["dense_bytes"] == pytest.approx(4 * entries, rel=0.1)
    copied = copy.deepcopy(result.report)
    assert type(copied).from_json(copied.to_json()).bytes == copied.bytes


def test_names_of_merged_weights():
    assert merged_name(("a.0.q.weight", "a.0.k.weight")) == "a.0.q+k.weight"
    assert merged_name(("a.q.weight", "b.q.weight", "c.weight")) == "a.q+b.q+c.weight"
    assert merged_name(("weight", "weight")) == "weight"
