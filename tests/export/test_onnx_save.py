"""Saving is all or nothing: real failures, stale files, two files that must fit together."""

import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

import elsa_compile.onnx_save as onnx_save
from elsa_compile.errors import UserInputError, VerificationError
from elsa_compile.onnx_layout import HALVES
from elsa_compile.runtime.onnx_file import inspect
from elsa_compile.write_onnx import WriteResult, write_onnx


def matmul_model(seed: int, size: int = 256, density: float = 0.3) -> ir.Model:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((size, size)).astype(np.float32)
    weight *= rng.random(weight.shape) < density
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", 1, ["n", size])],
        [helper.make_tensor_value_info("y", 1, ["n", size])],
        [numpy_helper.from_array(weight, "w")],
    )
    return ir.from_proto(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    )


def weight_of(model: ir.Model) -> Any:
    value = model.graph.initializers["w"].const_value
    assert value is not None
    return value.numpy()


def write(path: Path, seed: int, outside: bool, **options: Any) -> WriteResult:
    limit = 4000 if outside else 2_000_000_000
    return write_onnx(matmul_model(seed), path, in_file_limit_bytes=limit, **options)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in folder.iterdir()}


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("mode", ["always", "auto", "never"])
def test_data_outside_reads_back(
    mode: Any, dtype: Any, tmp_path: Path, decode: Any, run_onnx: Any
) -> None:
    path = tmp_path / "모델 a.onnx"
    result = write(path, 0, outside=True, mode=mode, dtype=dtype)
    assert result.paths[0] == path
    assert set(result.paths) == set(tmp_path.iterdir())
    assert result.data_bytes == result.paths[1].stat().st_size > 100_000
    assert result.model_bytes == path.stat().st_size <= 4000
    (record,) = (r for r in result.records if r.name == "w")
    assert record.external
    assert (record.form, record.index_encoding) in [("coo", "raw"), ("dense", None)]
    stored = weight_of(matmul_model(0)).astype(HALVES.get(dtype, np.float32))
    np.testing.assert_array_equal(decode(path)["w"], stored)
    x = np.ones((2, 256), np.float32)
    np.testing.assert_allclose(
        run_onnx(path, {"x": x})[0], x @ stored.astype(np.float32), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("outside", [False, True])
def test_a_second_save_replaces_the_first_and_its_data(outside: bool, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    foreign = ["m.onnx.data", "m2.onnx.0123456789abcdef.data", "m.onnx.0123.data", ".m.onnx.x.tmp"]
    for name in foreign:
        (tmp_path / name).write_bytes(b"not ours")
    write(path, 1, outside=True)
    result = write(path, 2, outside=outside)
    names = {entry.name for entry in tmp_path.iterdir()}
    assert names == {*foreign, *(p.name for p in result.paths)}
    assert len(result.paths) == (2 if outside else 1)


def test_saving_the_same_again_changes_nothing(tmp_path: Path) -> None:
    write(tmp_path / "m.onnx", 1, outside=True)
    before = snapshot(tmp_path)
    write(tmp_path / "m.onnx", 1, outside=True)
    assert snapshot(tmp_path) == before
    (data,) = (n for n in before if n.endswith(".data"))
    (tmp_path / data).write_bytes(b"damaged")
    write(tmp_path / "m.onnx", 1, outside=True)
    assert snapshot(tmp_path) == before


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may pass 20 kB: a write fails half-way, as on a full disk, for root too."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("previous", [None, False, True])
def test_a_write_that_fails_half_way_leaves_the_previous_output(
    outside: bool, previous: bool | None, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = tmp_path / "m.onnx"
    if previous is not None:
        write(path, 1, outside=previous)
    before = snapshot(tmp_path)
    request.getfixturevalue("small_files")
    with pytest.raises(UserInputError) as caught:
        write(path, 2, outside=outside)
    message = str(caught.value)
    assert message.startswith(f"cannot write {path}: ")
    assert "untouched" in message
    assert message.count("\n") == 0
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("same_data", [False, True])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failing_last_rename_leaves_the_previous_pair(
    outside: bool,
    same_data: bool,
    error: BaseException,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "m.onnx"
    write(path, 1, outside=outside)
    before = snapshot(tmp_path)
    replace = Path.replace

    def fail(source: Path, target: Path) -> Path:
        if target == path:
            raise error
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", fail)
    wanted = UserInputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(wanted):
        write(path, 1 if same_data else 2, outside=outside, metadata={"a": "b"})
    assert snapshot(tmp_path) == before


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"")
    cases = {
        tmp_path / "folder": "it is a folder",
        tmp_path / "none" / "m.onnx": "which is no folder; name a file in an existing folder",
        tmp_path / "file" / "m.onnx": "which is no folder",
        Path("/proc/m.onnx"): "No such file or directory",  # refused to root as well
        tmp_path / ("m" * 250 + ".onnx"): "File name too long",
    }
    before = sorted(tmp_path.rglob("*"))
    for path, reason in cases.items():
        with pytest.raises(UserInputError) as caught:
            write(path, 0, outside=False)
        assert reason in str(caught.value)
        assert str(caught.value).startswith(f"cannot write {path}: ")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserInputError, match="Permission denied"):
        write(tmp_path / "m.onnx", 0, outside=False)


@pytest.mark.parametrize("outside", [False, True])
def test_a_weight_that_changes_while_it_is_written_is_caught(
    outside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = matmul_model(0)
    array = weight_of(model).copy()
    model.graph.initializers["w"].const_value = ir.tensor(array, name="w")
    save = onnx_save.save

    def change(*args: Any) -> Any:
        array[:] = 1
        return save(*args)

    monkeypatch.setattr("elsa_compile.write_onnx.save", change)
    limit = 4000 if outside else 2_000_000_000
    with pytest.raises(VerificationError, match="change no weight while"):
        write_onnx(model, tmp_path / "m.onnx", mode="always", in_file_limit_bytes=limit)
    assert list(tmp_path.iterdir()) == []


def test_data_offsets_lie_on_pages(tmp_path: Path) -> None:
    result = write_onnx(
        matmul_model(0, size=800), tmp_path / "m.onnx", mode="always", in_file_limit_bytes=4000
    )
    (sparse,) = onnx.load(result.paths[0], load_external_data=False).graph.sparse_initializer
    places = [
        {entry.key: entry.value for entry in tensor.external_data}
        for tensor in (sparse.values, sparse.indices)
    ]
    assert [int(p["offset"]) % 4096 for p in places] == [0, 0]
    assert int(places[1]["offset"]) % 65536 == 0  # 1.5 MB of indices
    assert {p["location"] for p in places} == {result.paths[1].name}


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("mode", ["always", "auto", "never"])
def test_the_runtime_accepts_the_file_and_counts_the_same(
    mode: Any, outside: bool, tmp_path: Path
) -> None:
    result = write(tmp_path / "m.onnx", 0, outside=outside, mode=mode)
    found = inspect(tmp_path / "m.onnx", count_zero=True)
    assert (found.file_bytes, found.external_bytes) == (result.model_bytes, result.data_bytes)
    counted = [
        (w.name, w.shape, w.form, w.dtype, w.elements - (w.zeros or 0)) for w in found.weights
    ]
    assert counted == [(r.name, r.shape, r.form, r.dtype, r.nonzeros) for r in result.records]
