"""The kernel table: really measured, small; kept, found again, refused when it is not ours."""

import json

import numpy as np
import pytest

from elsa_compile.runtime import calibrate, kernels, packed, provider
from elsa_compile.runtime import kernel_timing as timing
from elsa_compile.runtime.bandwidth import read_gb_per_s
from elsa_compile.runtime.cli import main
from elsa_compile.runtime.errors import UserInputError, VerificationError

SMALL = {"shapes": ((96, 256), (256, 512)), "sparsities": (0.5, 0.9), "repetitions": 2,
         "sweep_bytes": 1 << 20}  # fmt: skip


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def table():
    return calibrate.calibrate(1, **SMALL)


def median(value):
    return {"min": value, "median": value, "max": value, "spread": 0.0}


def made(gains, dense_s=1e-9, stock=3.0, shape=(100, 100)):
    """A table of one shape whose dense product takes dense_s a weight.

    gains: {type: {sparsity: gain of one token}}.
    """
    about = calibrate.Machine("a processor", "avx2", 1, "1.0", "0123456789ab")
    seconds = dense_s * shape[0] * shape[1]
    rows = tuple(
        {"shape": list(shape), "sparsity": sparsity, "type": dtype, "tokens": 1,
         "format": "bitmap", "dense_s": median(seconds), "sparse_s": median(seconds / gain),
         "stock_s": median(seconds / stock), "speedup": median(gain)}
        for dtype, curve in gains.items()
        for sparsity, gain in curve.items()
    )  # fmt: skip
    return calibrate.KernelTable(about, rows, 30.0, "2026-11-25 12:00:00", 1.0)


def test_a_table_holds_every_case_and_times_that_make_sense(table):
    cases = {(tuple(r["shape"]), r["sparsity"], r["type"], r["tokens"]) for r in table.rows}
    assert len(cases) == len(table.rows) == 2 * 2 * 2 * 3
    for row in table.rows:
        for key in ("dense_s", "sparse_s", "speedup"):
            assert 0 < row[key]["min"] <= row[key]["median"] <= row[key]["max"]
        assert ("stock_s" in row) == (row["type"] == "int8")
        assert row["format"] in packed.KERNEL_FORMATS
    assert table.read_gb_per_s > 0.1


def test_it_is_kept_and_found_again(table, capsys):
    path = calibrate.save(table)
    assert path.parent == calibrate.cache_folder()
    assert calibrate.load(1).to_json() == table.to_json()
    assert main(["calibrate", "--threads", "1", "--show", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["file"] == str(path)
    assert found["rows"] == list(table.rows)
    assert main(["calibrate", "--threads", "1", "--show"]) == 0
    text = capsys.readouterr().out
    assert "256 x 512" in text
    assert "128 tokens" in text


def test_the_command_measures_keeps_and_tells(monkeypatch, capsys):
    """The whole way, with few and small cases."""
    whole = calibrate.calibrate
    monkeypatch.setattr(
        calibrate, "calibrate", lambda threads, **more: whole(threads, **{**more, **SMALL})
    )
    code = main(["calibrate", "--threads", "1", "--types", "float32", "--json"])
    shown = capsys.readouterr()
    assert code == 0
    assert {row["type"] for row in json.loads(shown.out)["rows"]} == {"float32"}
    assert "8 of 8, 0 s left: 256 x 512, 90% zeros, float32, 128 tokens" in shown.err
    table = calibrate.load(1)
    with pytest.raises(UserInputError, match="nothing about int8 .*--types float32 bfloat16 int8"):
        table.gain(256, 512, 0.1, "int8")


@pytest.mark.parametrize(
    "damage", ["cut", "machine", "text", "negative", "memory", "list", "bytes"]
)
def test_a_table_that_is_damaged_or_of_another_machine_is_refused(table, damage):
    path = calibrate.save(table)
    content = json.loads(path.read_text())
    if damage == "machine":
        content["machine"]["cpu"] = "another one"
    elif damage == "text":
        content["rows"][0]["speedup"]["median"] = "fast"
    elif damage == "negative":
        content["rows"][3]["dense_s"]["median"] = -1
    elif damage == "memory":
        content["read_gb_per_s"] = 0
    elif damage == "list":
        content = [content]
    text = json.dumps(content)
    path.write_text(text[:500] if damage == "cut" else text)
    if damage == "bytes":
        path.write_bytes(b"\xff" + path.read_bytes())
    with pytest.raises(UserInputError, match="is damaged .*; run: elsa-run calibrate --threads 1"):
        calibrate.load(1)


def test_nothing_there_says_what_to_run(monkeypatch, capsys):
    with pytest.raises(UserInputError, match="no kernel table for 3 thread.s. .*--threads 3"):
        calibrate.load(3)
    # Another onnxruntime or other kernels are another table.
    here = calibrate.this_machine(1)
    for change in ({"onnxruntime": "9.9"}, {"library": "other"}, {"threads": 2}, {"isa": "avx2x"}):
        assert calibrate.Machine(**{**here.__dict__, **change}).file != here.file
    monkeypatch.setattr(kernels, "_load", lambda: (None, "it was not built"))
    assert main(["calibrate", "--threads", "1"]) == 2
    assert "native kernels: it was not built" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--threads", "0"], "--threads is 0"), (["--repetitions", "1"], "--repetitions is 1"),
     (["--types", "int2"], "int2"), (["--show", "--types", "int8"], "mean nothing with it"),
     (["--show", "--repetitions", "9"], "leave out --show")],
)  # fmt: skip
def test_options_are_checked(arguments, said, capsys):
    assert main(["calibrate", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_is_said(table, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserInputError, match="cannot be written .*set XDG_CACHE_HOME"):
        calibrate.save(table)


def test_between_measured_points_times_are_linear():
    table = made({"float32": {0.5: 2.0, 0.9: 8.0}})
    assert table.gain(100, 100, 0.5, "float32") == pytest.approx(2.0)
    assert table.gain(100, 100, 0.1, "float32") == pytest.approx(8.0)
    # Half way: the mean of 1/2 and 1/8.
    assert table.gain(100, 100, 0.3, "float32") == pytest.approx(1 / 0.3125)
    assert table.gain(100, 100, 0.01, "float32") == pytest.approx(8.0)  # nothing is promised
    assert table.gain(100, 100, 1.0, "float32") == pytest.approx(1.0)  # grows with the density
    assert table.dense_seconds(10, 10) == pytest.approx(1e-7)


def test_a_weight_that_is_not_taken_costs_its_dense_time(monkeypatch):
    table = made({"float32": {0.5: 2.0}, "int8": {0.5: 4.0}})
    monkeypatch.setattr(packed, "taken", lambda *_: False)
    assert table.seconds_of(100, 100, 5000, "float32") == pytest.approx(1e-5)
    assert table.seconds_of(100, 100, 5000, "int8") == pytest.approx(1e-5 / 3)
    monkeypatch.setattr(packed, "taken", lambda *_: True)
    assert table.seconds_of(100, 100, 5000, "float32") == pytest.approx(1e-5 / 2)
    assert table.seconds_of(100, 100, 5000, "int8") == pytest.approx(1e-5 / 4)


def test_what_is_taken_is_what_the_provider_takes(tmp_path):
    """The rule for int8 behind a DequantizeLinear, against a session's own word."""
    for sparsity in (0.1, 0.4, 0.5, 0.6, 0.95):
        random = np.random.default_rng(1)
        (matrix,) = timing.sparse_matrices((512, 256), sparsity, 1, random)
        nonzeros = int(np.count_nonzero(matrix))
        for int8 in (False, True):
            data = timing.sweep_model([matrix], 2, int8=int8)
            timing.open_sweep(data, 1, {})
            said = provider.claims()[0]["format"] != "dense"
            dtype = "int8" if int8 else "float32"
            # Rounding to int8 makes a few more zeros.
            assert packed.taken(256, 512, nonzeros, dtype) == said, (sparsity, dtype)


# --- The timing itself ------------------------------------------------------------------------


@pytest.mark.parametrize("int8", [False, True])
def test_a_sweep_multiplies_each_copy_with_weights_of_its_own(int8):
    random = np.random.default_rng(0)
    matrices = timing.sparse_matrices((64, 32), 0.5, 2, random)
    opened = timing.open_sweep(timing.sweep_model(matrices, 5, int8=int8), 1, None)
    x = random.standard_normal((3, 64), dtype=np.float32)
    first, total = opened.run(["y0", "y"], {"x": x})
    turned = [np.roll(matrices[i % 2], i // 2, axis=0) for i in range(5)]
    assert len({m.tobytes() for m in turned}) == 5
    wanted = sum(x.astype(np.float64) @ m for m in turned)
    allowed = 0.05 * np.abs(wanted).max() if int8 else 1e-4
    assert np.abs(total - wanted).max() < allowed
    assert np.abs(first - x @ matrices[0]).max() < allowed


def test_a_product_that_the_provider_leaves_is_said(monkeypatch):
    monkeypatch.setattr(provider, "claims", list)
    with pytest.raises(VerificationError, match="took no product of float32 weights 96 x 256"):
        calibrate.calibrate(1, types=("float32", "float32"), **SMALL)


def test_a_wrong_product_is_not_timed():
    random = np.random.default_rng(0)
    matrices = timing.sparse_matrices((64, 32), 0.5, 1, random)
    opened = timing.open_sweep(timing.sweep_model(matrices, 2), 1, None)
    x = random.standard_normal((1, 64), dtype=np.float32)
    timing.check_sweep(opened, x, matrices[0], "float32")
    with pytest.raises(VerificationError, match="is off by"):
        timing.check_sweep(opened, x, matrices[0] * np.float32(1.01), "float32")


def test_memory_is_read_at_a_speed_that_can_be():
    assert 0.1 < read_gb_per_s(1, size=8 << 20) < 2000
    assert 0.1 < read_gb_per_s(3, size=8 << 20) < 2000
