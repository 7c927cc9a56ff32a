"""write_onnx on exported decoders: what is in the file, and what onnxruntime computes from it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from elsa_compile.errors import UnsupportedModelError, UserInputError
from elsa_compile.onnx_layout import HALVES
from elsa_compile.write_onnx import WriteResult, write_onnx

SHAPES = [(1, 1, 0), (2, 3, 5), (1, 7, 0), (3, 1, 9)]


def names_of(decoder: Any) -> dict[str, tuple[str, ...]]:
    """The 2-D parameters as the compiler calls them -> as the exporter calls them.

    A tied embedding has one canonical name; the graph has whichever the exporter met.
    """
    aliases: dict[int, list[str]] = {}
    for name, array in decoder.weights.items():
        if array.ndim == 2:
            aliases.setdefault(array.ctypes.data, []).append(name)
    return {group[0].removeprefix("model."): tuple(group) for group in aliases.values()}


def in_graph(decoder: Any, result: WriteResult, canonical: str) -> Any:
    """The source weight as it should stand in the file: (K, N) unless it was not transposed."""
    source = decoder.weights[f"model.{canonical}"]
    shape = next(r.shape for r in result.records if r.name == canonical)
    return source if shape == source.shape and not needs_transpose(canonical) else source.T


def needs_transpose(canonical: str) -> bool:
    """nn.Linear is (N, K), MatMul reads (K, N); Conv1D and embeddings are read as they are."""
    return "proj.weight" in canonical and ".h." not in canonical or canonical == "lm_head.weight"


@pytest.mark.parametrize("mode", ["auto", "always", "never"])
def test_fp32_file_holds_the_source_weights_and_computes_the_same(
    decoder: Any,
    tmp_path: Path,
    mode: Any,
    decode: Callable[..., Any],
    run_onnx: Callable[..., Any],
    decoder_feeds: Callable[..., Any],
) -> None:
    path = tmp_path / "model.onnx"
    result = write_onnx(decoder.model, path, mode=mode, expected_weights=names_of(decoder))
    assert result.paths == (path,)
    assert result.model_bytes == path.stat().st_size
    assert result.data_bytes == 0
    arrays = decode(path)
    assert list(arrays.keys() ^ {r.name for r in result.records}) == []
    for canonical in names_of(decoder):
        np.testing.assert_array_equal(arrays[canonical], in_graph(decoder, result, canonical))
    forms = {r.name: r.form for r in result.records}
    for name in decoder.pruned:
        assert forms[name.removeprefix("model.")] == ("dense" if mode == "never" else "coo")
    small = [r for r in result.records if len(r.shape) < 2]
    assert small
    assert all(r.form == "dense" for r in small)
    for shape in SHAPES:
        feed = decoder_feeds(*shape)
        for got, wanted in zip(
            run_onnx(path, feed), run_onnx(decoder.reference, feed), strict=True
        ):
            np.testing.assert_array_equal(got, wanted)


def test_auto_is_the_smallest_and_the_records_are_exact(decoder: Any, tmp_path: Path) -> None:
    sizes = {}
    for mode in ("auto", "always", "never"):
        path = tmp_path / f"{mode}.onnx"
        result = write_onnx(decoder.model, path, mode=mode, expected_weights=names_of(decoder))
        sizes[mode] = result.model_bytes
        frame = onnx.load(path)
        for record in result.records:
            lone = onnx.ModelProto()
            lone.graph.initializer.extend(
                t for t in frame.graph.initializer if t.name == record.name
            )
            lone.graph.sparse_initializer.extend(
                t for t in frame.graph.sparse_initializer if t.values.name == record.name
            )
            assert record.stored_bytes == lone.graph.ByteSize()
            candidates = (record.dense_bytes, record.coo_varint_bytes, record.coo_raw_bytes)
            assert record.stored_bytes in candidates
            if mode == "auto" and record.name.removeprefix("model.") in names_of(decoder):
                assert record.stored_bytes == min(candidates)
    assert sizes["auto"] < 0.6 * sizes["never"]
    assert sizes["auto"] <= sizes["always"]


def test_no_weight_stays_behind_a_transpose_unless_it_is_tied(decoder: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    result = write_onnx(decoder.model, path, expected_weights=names_of(decoder))
    graph = onnx.load(path).graph
    stored = {r.name for r in result.records}
    behind = [n.input[0] for n in graph.node if n.op_type == "Transpose" and n.input[0] in stored]
    if "transformer.wte.weight" in stored:
        assert behind == ["transformer.wte.weight"]
        readers = sorted(n.op_type for n in graph.node if behind[0] in n.input)
        assert readers == ["Gather", "Transpose"]
        assert "lm_head.weight" not in stored
        assert "one copy serves both" in result.notes[0]
    else:
        assert behind == []
        assert result.notes == ()


@pytest.mark.parametrize("kind", HALVES)
def test_halves_are_half_the_weights_and_computed_in_fp32(
    kind: str,
    decoder: Any,
    tmp_path: Path,
    decode: Callable[..., Any],
    run_onnx: Callable[..., Any],
    decoder_feeds: Callable[..., Any],
) -> None:
    path, half = tmp_path / "model.onnx", HALVES[kind]
    result = write_onnx(decoder.model, path, dtype=kind, expected_weights=names_of(decoder))
    arrays = decode(path)
    for canonical in names_of(decoder):
        source = in_graph(decoder, result, canonical)
        assert arrays[canonical].dtype == half
        np.testing.assert_array_equal(arrays[canonical], source.astype(half))
    norms = [r for r in result.records if len(r.shape) == 1 and "weight" in r.name]
    assert norms
    assert {r.dtype for r in norms} == {"float32"}
    # The same rounding done to the untouched export: what remains is the order of no operation.
    rounded = onnx.load(decoder.reference)
    exporter_names = {alias for group in names_of(decoder).values() for alias in group}
    for tensor in rounded.graph.initializer:
        if tensor.name in exporter_names:
            array = onnx.numpy_helper.to_array(tensor).astype(half).astype(np.float32)
            tensor.raw_data = array.tobytes()
    onnx.save(rounded, tmp_path / "rounded.onnx")
    for shape in SHAPES:
        feed = decoder_feeds(*shape)
        for got, wanted in zip(
            run_onnx(path, feed), run_onnx(tmp_path / "rounded.onnx", feed), strict=True
        ):
            assert got.dtype == np.float32
            np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6)


def test_a_folded_export_still_computes_the_same(
    decoder: Any,
    tmp_path: Path,
    run_onnx: Callable[..., Any],
    decoder_feeds: Callable[..., Any],
) -> None:
    path = tmp_path / "model.onnx"
    result = write_onnx(decoder.folded, path)
    assert sum(r.form == "coo" for r in result.records) == len(decoder.pruned)
    feed = decoder_feeds(2, 3, 5)
    for got, wanted in zip(run_onnx(path, feed), run_onnx(decoder.reference, feed), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6)


def test_weights_are_recognised_without_being_named(decoder: Any, tmp_path: Path) -> None:
    result = write_onnx(decoder.model, tmp_path / "model.onnx")
    sparse = sorted(r.name for r in result.records if r.form == "coo")
    assert sparse == sorted(decoder.pruned)
    reasons = {r.reason for r in result.records if r.name not in decoder.pruned}
    assert reasons <= {"not one of the model's weights", "COO would be larger"}


def test_a_weight_that_folding_renamed_is_an_error(decoder: Any, tmp_path: Path) -> None:
    lost = decoder.pruned[0] + ".lost"
    with pytest.raises(UnsupportedModelError, match=rf"{lost} \(1 of 2 in all\)"):
        write_onnx(decoder.model, tmp_path / "m.onnx", expected_weights=[decoder.pruned[0], lost])
    assert list(tmp_path.iterdir()) == []


def test_the_model_that_was_given_is_not_changed(decoder: Any, tmp_path: Path) -> None:
    before = [n.op_type for n in decoder.model.graph], list(decoder.model.graph.initializers)
    tensors = [v.const_value for v in decoder.model.graph.initializers.values()]
    for name in ("a.onnx", "b.onnx"):
        write_onnx(decoder.model, tmp_path / name, dtype="fp16")
    assert before == (
        [n.op_type for n in decoder.model.graph],
        list(decoder.model.graph.initializers),
    )
    after = [v.const_value for v in decoder.model.graph.initializers.values()]
    assert all(a is b for a, b in zip(tensors, after, strict=True))
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_metadata_is_ours_and_traces_of_the_exporting_machine_are_gone(
    decoder: Any, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    write_onnx(decoder.model, path, metadata={"elsa.recipe": "prune: 가지치기\n", "empty": ""})
    model = onnx.load(path)
    found = {entry.key: entry.value for entry in model.metadata_props}
    assert found == {"elsa.recipe": "prune: 가지치기\n", "empty": ""}
    onnx.checker.check_model(str(path))
    untouched = onnx.load(decoder.reference)
    for graph in (model.graph, untouched.graph):
        graph.ClearField("initializer")
        graph.ClearField("sparse_initializer")
    assert b".py" in untouched.SerializeToString()  # what is to go was there
    assert b".py" not in model.SerializeToString()
    assert b"name_scopes" in model.SerializeToString()


@pytest.mark.parametrize("option", ["dtype", "mode"])
def test_an_unknown_option_is_refused(decoder: Any, tmp_path: Path, option: Any) -> None:
    options: dict[str, Any] = {option: "int3"}
    with pytest.raises(UserInputError, match=f"{option} is 'int3', wanted one of"):
        write_onnx(decoder.model, tmp_path / "m.onnx", **options)
    assert list(tmp_path.iterdir()) == []
