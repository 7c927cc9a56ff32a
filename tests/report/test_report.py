"""The report: data that loads back, words that follow from numbers, a page that holds together."""

import json
import math
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch

import elsa_compile
from elsa_compile import export
from elsa_compile.errors import UserInputError
from elsa_compile.passes import AllocateUniform, PruneMagnitude, QuantizeWeights
from elsa_compile.recipe import Recipe
from elsa_compile.report import (
    Report,
    honest_sentences,
    make_report,
    render_table,
    size_text,
    write_report,
    zero_map,
)
from elsa_compile.report_html import render_html
from elsa_compile.report_plots import grid_png

ACCURACY = {
    "metric": "perplexity", "data": "valid.txt", "protocol": "windows", "window": 512,
    "windows": 4, "tokens": 2044, "bos": "auto", "dense": 20.0, "compiled": 22.0,
    "onnxruntime": 22.0001,
}  # fmt: skip
PROBE = {"version": 1, "file": "model.onnx", "tolerance": 1e-3, "language": []}


def of(sparsity, tmp_path, width=64, mode="auto", more=(), format="plain"):
    """Report of a linear layer pruned at `sparsity`."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.ReLU())
    passes = (AllocateUniform(sparsity=sparsity), PruneMagnitude(), *more)
    program = elsa_compile.apply(model, *passes, example_inputs=(torch.randn(2, width),))
    written = export.export(program, tmp_path / "model.onnx", mode=mode, format=format)
    report = make_report(
        program, Recipe(passes), written, output="model.onnx", probe=PROBE,
        verification={"ok": True, "checks": [
            {"name": "logits", "ok": True, "detail": "fine", "difference": 0.0, "tolerance": 1e-3}
        ]},
    )  # fmt: skip
    return report, tmp_path / "model.onnx"


@pytest.fixture
def report(tmp_path):
    return of(0.9, tmp_path)[0]


def test_json_loads_back(report):
    again = Report.from_json(report.to_json())
    assert again == replace(report, weights=json.loads(json.dumps(report.weights)))
    assert json.loads(report.to_json())["probe"] == PROBE


def test_parameters_that_left_the_model_are_told(report):
    assert "taken out" not in " ".join(honest_sentences(report))
    left = [*report.passes, {**report.passes[-1], "counts": {"parameters": 2_500_000}}]
    said = " ".join(honest_sentences(replace(report, passes=left)))
    assert "2,500,000 parameters were taken out of the model, 9.54 MiB" in said


def test_infinite_perplexity_survives_json(report):
    broken = replace(report, accuracy={**ACCURACY, "compiled": math.inf})
    again = Report.from_json(broken.to_json())
    assert again.accuracy["compiled"] == math.inf
    assert "no longer finite" in " ".join(honest_sentences(again))


@pytest.mark.parametrize("text", ["", "[]", '{"schema_version": 9}', '{"schema_version": 1}'])
def test_what_is_no_report_is_refused(text):
    with pytest.raises(UserInputError, match=r"elsa_report\.json"):
        Report.from_json(text)


def test_the_bytes_are_those_of_the_file(tmp_path):
    report, path = of(0.9, tmp_path)
    assert report.bytes["total"] == path.stat().st_size
    forms = report.bytes["by_form"].values()
    assert report.bytes["dense_total"] - report.bytes["total"] == sum(
        row["dense"] - row["stored"] for row in forms
    )
    assert report.weights[0]["form"] == "coo"
    rows = {row["form"]: row for row in report.bytes["side_by_side"]}
    assert [form for form, row in rows.items() if row["now"]] == ["coo"]
    assert rows["packed"]["bytes"] < rows["coo"]["bytes"] < rows["dense"]["bytes"]


def test_a_file_that_is_not_smaller_is_not_called_smaller(tmp_path):
    small = " ".join(honest_sentences(of(0.9, tmp_path)[0]))
    report = of(0.1, tmp_path)[0]
    large = " ".join(honest_sentences(report))
    assert report.weights[0]["form"] == "dense"
    assert "it would have with every weight dense" in small
    assert "not smaller than a dense one" in large
    assert "1 pruned weights stay dense in the file: at their sparsity the indices" in large
    assert "expands sparse weights" in small
    assert "expands sparse weights" not in large


def test_packed_weights_are_named_with_what_decoding_needs(tmp_path):
    report, path = of(0.8, tmp_path, format="packed")
    assert report.bytes["total"] == path.stat().st_size
    assert report.weights[0]["form"] == "packed"
    assert report.weights[0]["bytes"] < report.weights[0]["coo_bytes"]
    said = " ".join(honest_sentences(report))
    assert "stock onnxruntime needs about 116.00 KiB for that" in said
    assert "decoded by functions" not in " ".join(honest_sentences(of(0.8, tmp_path)[0]))


@pytest.mark.parametrize(("bits", "wanted"), [("int8", 1.0), ("int4", 0.5)])
def test_whole_numbers_are_counted_with_their_scales(tmp_path, bits, wanted):
    quantise = QuantizeWeights(bits=bits, group_size=16)
    report, path = of(0.5, tmp_path, width=128, more=(quantise,))
    row = report.weights[0]
    assert (row["dtype"], row["form"], row["group_size"]) == (bits, "dense", 16)
    per_entry = row["bytes"] / 128**2
    assert wanted + 4 / 16 < per_entry < wanted + 4 / 16 + 0.01
    assert row["dense_bytes"] == pytest.approx(4 * 128**2, rel=0.01)
    assert report.bytes["total"] == path.stat().st_size
    assert report.bytes["dense_total"] - report.bytes["total"] == sum(
        form["dense"] - form["stored"] for form in report.bytes["by_form"].values()
    )
    assert set(report.bytes["by_form"]) >= {f"{bits} dense", "scales"}
    said = " ".join(honest_sentences(report))
    assert f"Quantised: 1 as {bits}, with scales {per_entry:.2f} bytes an entry instead of 4.0" in (
        said
    )
    exact = {**ACCURACY, "onnxruntime_exact": 21.5}
    assert "gives 21.500 without" in " ".join(honest_sentences(replace(report, accuracy=exact)))
    assert f"{bits} dense" in render_html(report)
    assert Report.from_json(report.to_json()).weights[0]["scale_bytes"] == row["scale_bytes"]


def test_dense_by_request_is_not_blamed_on_the_sparsity(tmp_path):
    report = of(0.9, tmp_path, mode="never")[0]
    said = " ".join(honest_sentences(report))
    assert "stay dense in the file: sparse initializers are off" in said
    assert "indices" not in said
    assert report.weights[0]["reason"] == "sparse initializers are off"


def test_sparse_by_request_is_not_called_a_gain(tmp_path):
    said = " ".join(honest_sentences(of(0.1, tmp_path, mode="always")[0]))
    assert "times as large as with every weight dense" in said
    assert "What is gained" not in said
    assert "expands sparse weights" in said


def test_zeros_of_an_unpruned_weight_are_not_called_pruned(tmp_path):
    report = of(0.9, tmp_path)[0]
    row = {**report.weights[0], "form": "dense", "planned": 0.0, "sparsity": 0.5, "reason": "x"}
    said = " ".join(honest_sentences(replace(report, weights=[row])))
    assert "stay dense" not in said
    assert "of the pruned weights" not in said


def test_accuracy_that_was_not_measured_is_said_to_be_so(report):
    assert "the model's own task" in honest_sentences(report)[0]  # no --eval-data would take it
    decoder = replace(report, model={**report.model, "kind": "decoder"})
    assert honest_sentences(decoder)[0].endswith("given with --eval-data.")
    measured = honest_sentences(replace(report, accuracy=ACCURACY))
    assert measured[0].startswith("Perplexity went from 20.000 to 22.000 (+10.0%) on 2,044 tokens")
    heavy = honest_sentences(replace(report, accuracy={**ACCURACY, "compiled": 60.0}))
    assert any("heavy loss" in sentence for sentence in heavy)


def test_the_table_fits_a_terminal(report):
    text = render_table(replace(report, accuracy=ACCURACY, warnings=["look at this"]))
    assert max(map(len, text.splitlines())) <= 96
    assert "dense 20.000, compiled 22.000" in text
    assert "Warning: look at this" in text


def test_zero_maps_count_zeros():
    matrix = torch.ones(96, 10)
    matrix[:48] = 0
    grid = zero_map(matrix)
    assert len(grid) == 48
    assert len(grid[0]) == 10
    assert grid[0][0] == 1.0
    assert grid[-1][0] == 0.0


def test_sizes_for_people():
    assert size_text(512) == "512 B"
    assert size_text(1616645) == "1.54 MiB"
    assert size_text(3 * 2**30) == "3.00 GiB"


class Page(HTMLParser):
    """Checks that tags balance and that nothing is loaded from elsewhere."""

    VOID = {"meta", "link", "br", "img", "line", "rect"}

    def __init__(self):
        super().__init__()
        self.open, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            inline = tag == "img" and (value or "").startswith("data:image/png;base64,")
            assert inline or name not in ("src", "href"), (tag, name, value)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        if tag in self.VOID:
            return
        assert self.open.pop() == tag


def test_the_page_is_self_contained_and_balanced(report):
    page = Page()
    text = render_html(replace(report, accuracy=ACCURACY))
    page.feed(text)
    assert page.open == []
    assert "script" not in page.tags
    assert "http" not in text
    assert "prefers-color-scheme: dark" in text
    assert page.tags.count("svg") == 3  # sparsity, change, forms
    assert text.count('src="data:image/png;base64,') == 1  # where the zeros are


def test_every_plot_is_well_formed_and_labelled(report):
    text = render_html(report)
    for part in text.split("<svg")[1:]:
        svg = ElementTree.fromstring("<svg" + part.split("</svg>")[0] + "</svg>")
        assert svg.attrib["aria-label"]


def test_names_from_the_model_are_escaped(report):
    evil = '<img src=x onerror="alert(1)">'
    rows = [{**report.weights[0], "name": evil}]
    text = render_html(
        replace(report, weights=rows, model={**report.model, "source": evil}, warnings=[evil])
    )
    assert "<img src=x" not in text
    assert text.count("&lt;img src=x") >= 4


def test_both_files_are_written(report, tmp_path):
    paths = write_report(report, tmp_path)
    assert [path.name for path in paths] == ["elsa_report.json", "elsa_report.html"]
    assert Report.from_json(paths[0].read_text()).output == "model.onnx"


def test_nothing_in_the_report_names_the_machine(report, tmp_path):
    import socket

    text = report.to_json()
    assert str(tmp_path) not in text
    assert socket.gethostname() not in text


def test_the_course_of_a_training_pass_is_drawn(report):
    curves = {
        "loss": [[1, 4.0], [2, 3.0]],
        "validation": [[2, 3.5], [4, 3.25]],
        "primal": [[1, 0.5], [2, 0.0], [3, 0.01]],
        "made_up": [[1, 1.0], [2, math.nan]],
    }
    passes = [{**report.passes[0], "name": "prune-elsa", "curves": curves}]
    text = render_html(replace(report, passes=passes))
    assert "Course of prune-elsa" in text
    assert text.count("<polyline") == 3  # one of made_up's two points is no number
    assert "loss over steps" in text


def test_a_grid_becomes_a_png_that_decodes():
    import base64
    import struct
    import zlib

    data = base64.b64decode(grid_png([[0.0, 1.0], [0.5, 2.0], [1.0, 0.0]], (1, 2, 3)).split(",")[1])
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (2, 3)
    start = data.index(b"IDAT") + 4
    rows = zlib.decompress(data[start : data.index(b"IEND") - 8])
    assert rows[:9] == bytes([0, 1, 2, 3, 0, 1, 2, 3, 255])
    assert rows[9:18] == bytes([0, 1, 2, 3, 128, 1, 2, 3, 255])
