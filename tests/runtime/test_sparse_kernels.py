"""Every kernel against float64, over shapes, densities, formats, value types, instruction sets."""

import struct

import numpy as np
import pytest

from elsa_compile.runtime import kernels, packed, reference
from elsa_compile.runtime.errors import UserInputError

ISAS = ("portable", "avx2", "avx512", "avx512vnni")
SHAPES = [(1, 1), (5, 7), (16, 64), (37, 130), (64, 576), (33, 700)]  # N, K
TOKENS = (1, 2, 3, 4, 5, 8, 15, 16, 33, 130)  # all paths, part-filled tiles, more than one tile


def runnable():
    """Instruction sets of this processor, as names for ELSA_ISA."""
    ok, why = kernels.available()
    assert ok, why
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(kernels.ISA_ENVIRONMENT, raising=False)
        return ISAS[: ISAS.index(kernels.isa()) + 1]


def made(rows, columns, density, seed=0):
    """A weight with some empty rows and one dense one, unless it is all zero or all dense."""
    random = np.random.default_rng(seed)
    weight = random.standard_normal((rows, columns)).astype(np.float32)
    weight[random.random((rows, columns)) >= density] = 0
    if 0 < density < 1 and rows > 4:
        weight[1] = 0
        weight[3] = random.standard_normal(columns)
    return weight


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    if request.param not in runnable():
        pytest.skip(f"this processor has no {request.param}")
    monkeypatch.setenv(kernels.ISA_ENVIRONMENT, request.param)
    return request.param


@pytest.mark.parametrize("density", [0.0, 0.03, 0.3, 1.0])
@pytest.mark.parametrize("dtype", reference.DTYPES)
@pytest.mark.parametrize("form", packed.KERNEL_FORMATS)
def test_products_are_those_of_float64(isa, form, dtype, density):
    random = np.random.default_rng(1)
    for rows, columns in SHAPES:
        weight = made(rows, columns, density)
        truth = reference.stored(weight, dtype)
        kept = packed.pack(weight, form, dtype)
        assert kept.isa == isa
        for tokens in TOKENS:
            x = random.standard_normal((tokens, columns)).astype(np.float32)
            bias = random.standard_normal(rows).astype(np.float32)
            wanted = reference.matmul(x, truth) + bias
            bound = reference.error_bound(x, truth) + 3 * 2.0**-24 * np.abs(wanted)
            bound += 2.0**-23 * np.abs(bias)
            assert (np.abs(kept.multiply(x, bias) - wanted) <= bound).all(), (rows, columns, tokens)


@pytest.mark.parametrize("dtype", reference.DTYPES)
def test_full_rows_among_nearly_empty_ones(isa, dtype):
    """Kernels of few non-zeros meet many: 17 and 64 of 64 columns."""
    random = np.random.default_rng(4)
    weight = made(66, 577, 0.05)
    weight[3] = random.standard_normal(577)
    weight[40, 64:81] = 1.5
    weight[65, 100:180] = random.standard_normal(80)
    assert np.count_nonzero(weight) < 0.1 * weight.size
    truth = reference.stored(weight, dtype)
    kept = packed.pack(weight, "bitmap", dtype)
    for tokens in (1, 2, 3, 4, 7, 9, 40):
        x = random.standard_normal((tokens, 577)).astype(np.float32)
        wanted = reference.matmul(x, truth)
        bound = reference.error_bound(x, truth) + 2.0**-24 * np.abs(wanted)
        assert (np.abs(kept.multiply(x) - wanted) <= bound).all(), tokens


@pytest.mark.parametrize("density", [0.0, 0.03, 0.3, 1.0])
@pytest.mark.parametrize("form", packed.KERNEL_FORMATS)
def test_int8_sums_are_exact(isa, form, density):
    random = np.random.default_rng(2)
    for rows, columns in [*SHAPES, (3, 2100)]:
        weight = made(rows, columns, density)
        kept = packed.pack(weight, form, "int8")
        # More tokens are rounded where that is the fastest: with VNNI, not nearly empty.
        wide = isa == "avx512vnni" and (form == "rows" or (form == "bitmap" and density >= 0.3))
        more = (*(5, 7), *((8, 9, 11, 133) if form == "rows" else ())) if wide else ()
        for tokens in (1, 2, 3, 4, *more):
            x = random.standard_normal((tokens, columns)).astype(np.float32)
            wanted = reference.matmul_int8(x, weight)
            # The integers are exact; their conversion and two scales round three times.
            found = kept.multiply(x, activations="int16")
            assert (np.abs(found - wanted) <= np.abs(wanted) * 4 * 2.0**-24).all()


def test_int8_survives_the_largest_sums(isa):
    """Of a row that fills 32 bits, and with it one that fills little."""
    weight = np.full((5, 4100), -1, np.float32)
    weight[2, 1:] = 0
    wanted = 3 * np.array([4100, 4100, 1, 4100, 4100])
    x = np.full((2, 4100), 3, np.float32)
    for form in packed.KERNEL_FORMATS:
        kept = packed.pack(weight, form, "int8")
        assert np.allclose(kept.multiply(x, activations="int16"), -wanted, rtol=1e-6)
        assert np.allclose(kept.multiply(-x, activations="int16"), wanted, rtol=1e-6)


def test_rounded_activations_are_nearly_float32(isa):
    """One of them a hundred times the others, which one scale of 8 bits would wipe out."""
    weight = made(64, 576, 0.3)
    x = np.random.default_rng(4).standard_normal((3, 576)).astype(np.float32)
    x[:, 7] *= 100
    exact = reference.matmul(x, reference.stored(weight, "int8"))
    found = packed.pack(weight, "bitmap", "int8").multiply(x, activations="int16")
    assert np.abs(found - exact).max() < 2e-3 * np.abs(exact).std()


def test_activations_of_zero_or_without_end(isa):
    kept = packed.pack(made(8, 70, 0.5), "bitmap", "int8")
    x = np.zeros((3, 70), np.float32)
    x[1, 4] = np.inf
    x[2] = 1e-39
    found = kept.multiply(x, activations="int16")
    assert (found[0] == 0).all()
    assert np.isnan(found[1]).all()
    assert np.isfinite(found[2]).all()


@pytest.mark.parametrize("tokens", [1, 5, 64, 100])
def test_instruction_sets_agree_on_a_real_shape(tokens, monkeypatch):
    weight = made(192, 576, 0.3)
    x = np.random.default_rng(3).standard_normal((tokens, 576)).astype(np.float32)
    results = []
    for name in runnable():
        monkeypatch.setenv(kernels.ISA_ENVIRONMENT, name)
        results.append(packed.pack(weight, "bitmap").multiply(x))
    for result in results[1:]:
        assert np.abs(result - results[0]).max() < 1e-4


# Formats


@pytest.mark.parametrize("dtype", reference.DTYPES)
@pytest.mark.parametrize("form", reference.FORMATS)
def test_round_trips_are_exact(form, dtype):
    for density in (0.0, 0.02, 0.3, 1.0):
        for rows, columns in [*SHAPES, (3, 2100)]:
            weight = made(rows, columns, density)
            wanted = reference.stored(weight, dtype).astype(np.float32)
            kept = packed.pack(weight, form, dtype)
            assert np.array_equal(kept.unpack(), wanted)
            assert np.array_equal(reference.decode(kept.data).astype(np.float32), wanted)
            assert kept.nonzeros == np.count_nonzero(wanted)
            assert packed.load(kept.data).shape == (rows, columns)


@pytest.mark.parametrize("dtype", reference.DTYPES)
def test_rows_of_every_value_stay_in_memory(dtype):
    weight = made(37, 130, 0.3)
    kept = packed.pack(weight, "rows", dtype)
    wanted = reference.stored(weight, dtype).astype(np.float32)
    assert np.array_equal(kept.unpack(), wanted)
    assert kept.nonzeros == np.count_nonzero(wanted)
    assert kept.nbytes >= 40 * 192 * (4 if dtype == "float32" else 1 if dtype == "int8" else 2)
    with pytest.raises(UserInputError, match="format number 3, wanted 1 or 2"):
        packed.load(kept.data)


def test_special_values_are_kept_and_negative_zero_is_a_zero():
    weight = np.array([[np.inf, -0.0, 0, np.nan, 1e-42, -65504, 65520]], np.float32)
    for form in reference.FORMATS:
        assert np.array_equal(packed.pack(weight, form).unpack(), weight, equal_nan=True)
        kept = packed.pack(weight, form)
        assert kept.nonzeros == 5
        half = packed.pack(weight, form, "float16").unpack()[0]
        assert np.array_equal(half[[0, 3]], weight[0, [0, 3]], equal_nan=True)
        assert list(half[4:]) == [0, -65504, np.inf]
        short = packed.pack(weight, form, "bfloat16").unpack()[0]
        assert short[0] == np.inf
        assert np.isnan(short[3])


def test_every_half_rounds_as_numpy_does():
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    every = every[np.isfinite(every)]
    between = np.nextafter((every[1:] + every[:-1]) / 2, np.float32(np.inf))
    values = np.concatenate([every, (every[1:] + every[:-1]) / 2, between])[None]
    wanted = values.astype(np.float16).astype(np.float32)
    assert np.array_equal(packed.pack(values, "bitmap", "float16").unpack(), wanted)
    wanted = reference.round_bfloat16(values)
    assert np.array_equal(packed.pack(values, "bitmap", "bfloat16").unpack(), wanted)


def test_strides_and_given_scales():
    weight = made(20, 30, 0.5)
    wide = np.zeros((30, 50), np.float32)
    wide[:, 10:30] = weight.T
    assert np.array_equal(packed.pack(wide[:, 10:30].T).unpack(), weight)
    assert np.array_equal(packed.pack(weight[::-1]).unpack(), weight[::-1])
    scales = np.full(20, 0.05, np.float32)
    codes, _ = reference.quantise_rows(weight, scales)
    found = packed.pack(weight, "sliced", "int8", scales).unpack()
    assert np.array_equal(found, codes * np.float32(0.05))


@pytest.mark.parametrize("dtype", reference.DTYPES)
def test_the_size_is_that_of_the_formula(dtype):
    weight = made(37, 130, 0.4)
    codes = reference.stored(weight, dtype)
    groups = [int(np.count_nonzero(codes[i : i + 4])) for i in range(0, 37, 4)]
    assert packed.pack(weight, "bitmap", dtype).nbytes == packed.bitmap_nbytes(
        37, 130, groups, dtype
    )


HEADER = {"magic": 0, "version": 4, "format": 6, "type": 7, "rows": 8, "columns": 12,
          "nonzeros": 16, "stream": 24, "reserved": 40}  # fmt: skip
FAULTS = {
    "magic": (b"ELSQ", "ELSP"),
    "version": (struct.pack("<H", 9), "version 9, wanted 2"),
    "format": (b"\x03", "format number 3"),
    "type": (b"\x04", "value type 4"),
    "rows": (struct.pack("<I", 0), "shape 0 x"),
    "columns": (struct.pack("<I", (1 << 24) + 1), "columns"),
    "nonzeros": (struct.pack("<Q", 3), "header says 3"),
    "stream": (struct.pack("<Q", 1 << 63), "header speaks of"),
    "reserved": (b"\x01", "reserved"),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("form", reference.FORMATS)
def test_a_damaged_header_is_refused(form, name):
    data = packed.pack(made(20, 70, 0.5), form).data
    value, said = FAULTS[name]
    data[HEADER[name] : HEADER[name] + len(value)] = np.frombuffer(value, np.uint8)
    with pytest.raises(UserInputError, match=said):
        packed.load(data)


def test_damaged_insides_are_refused():
    bitmap = packed.pack(made(6, 70, 0.5), "bitmap").data  # offsets at 64, stream at 128
    sliced = packed.pack(made(6, 700, 0.02), "sliced").data  # 64, steps 128, order 192, stream 256
    int8 = packed.pack(made(6, 70, 0.5), "bitmap", "int8").data  # scales 128, sums 192

    def refused(data, at, dtype, value, said):
        broken = data.copy()
        broken[at : at + np.dtype(dtype).itemsize] = np.frombuffer(
            np.array(value, dtype).tobytes(), np.uint8
        )
        with pytest.raises(UserInputError, match=said):
            packed.load(broken)

    refused(bitmap, 64, np.uint64, 64, "first offset")
    refused(bitmap, 72, np.uint64, 65, "out of order")
    refused(bitmap, 72, np.uint64, 1 << 40, "out of order")
    first = int(np.unpackbits(bitmap[128:160]).sum())  # values of the first chunk
    second = 128 + 4 * 8 + 4 * first
    refused(bitmap, second + 7, np.uint8, 128, "outside the matrix")  # column 127 of 70
    refused(bitmap, 128, np.uint64, 0, "bit outside the matrix")  # values are taken for bits
    refused(bitmap, second, np.uint64, 0, "bitmap counts|non-zeros")
    full = packed.pack(made(8, 128, 1.0), "bitmap").data
    refused(full, 72, np.uint64, 64, "without room for what its bitmap counts")
    refused(sliced, 128, np.uint32, 1 << 20, "steps in")
    refused(sliced, 192, np.uint32, 6, "permutation")
    refused(sliced, 192, np.uint32, int(sliced[196]), "permutation")
    refused(sliced, 64, np.uint64, 1, "first offset")
    refused(sliced, 256 + 16, np.uint8, 0, "two values for one element")
    refused(int8, 128, np.float32, np.nan, "scale of row 0")
    refused(int8, 192, np.int32, 77777, "sum of row 0")
    for data in (bitmap, sliced, int8):
        for size in (0, 10, 63, 64, 100, data.size - 1):
            with pytest.raises(UserInputError, match="bytes"):
                packed.load(data[:size])
        with pytest.raises(UserInputError, match="bytes"):
            packed.load(np.concatenate([data, data[:64]]))


def test_a_column_may_not_leave_the_matrix():
    weight = np.zeros((1, 300), np.float32)
    weight[0, [5, 299]] = 1
    data = packed.pack(weight, "sliced").data  # steps of 5, 255 and 39 from column 0
    data[256 + 32] += 1
    with pytest.raises(UserInputError, match="column outside the matrix"):
        packed.load(data)


def test_bad_arguments_are_said():
    weight = made(4, 8, 0.5)
    for arguments, said in (
        ((weight, "csr"), "wanted one of bitmap, sliced, rows"),
        ((weight[0],), r"wanted \(N, K\)"),
        ((weight[:0],), "without elements"),
        ((weight * np.nan, "bitmap", "int8"), "not finite"),
        ((weight, "bitmap", "float32", np.ones(4, np.float32)), "for int8"),
        ((np.ones((1, (1 << 17) + 1), np.float32), "bitmap", "int8"), "too large"),
    ):
        with pytest.raises(UserInputError, match=said):
            packed.pack(*arguments)
    kept = packed.pack(weight)
    with pytest.raises(UserInputError, match=r"wanted \(M, 8\)"):
        kept.multiply(np.ones((2, 7), np.float32))
    with pytest.raises(UserInputError, match=r"wanted \(4,\)"):
        kept.multiply(np.ones((2, 8), np.float32), np.ones(8, np.float32))


def test_an_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv(kernels.ISA_ENVIRONMENT, "sse9")
    with pytest.raises(UserInputError, match="wanted portable, avx2, avx512 or avx512vnni"):
        packed.pack(made(4, 8, 0.5))
    with pytest.raises(UserInputError, match="'sse9'"):
        kernels.isa()


# The cost model


def test_the_cost_model_knows_when_to_stay_dense(monkeypatch):
    monkeypatch.setenv(kernels.ISA_ENVIRONMENT, runnable()[-1])
    assert packed.choose(2048, 2048, 2048 * 2048)[0] == "dense"
    assert packed.choose(2048, 2048, 2048 * 2048 * 2 // 3)[0] == "dense"  # prompts would lose
    assert packed.choose(8, 8, 0)[0] == "dense"
    if runnable()[-1] == "portable":
        return
    total = 2048 * 2048
    assert packed.choose(2048, 2048, total // 2)[0] == "bitmap"
    monkeypatch.setenv(kernels.ISA_ENVIRONMENT, "avx2")
    assert packed.choose(2048, 2048, total // 50)[0] == "sliced"  # no lanes
    monkeypatch.setenv(kernels.ISA_ENVIRONMENT, runnable()[-1])
    gains = [packed.choose(2048, 2048, int(total * d))[1] for d in np.linspace(0.01, 0.9, 40)]
    assert all(a >= b for a, b in zip(gains, gains[1:], strict=False))
    monkeypatch.setenv(kernels.ISA_ENVIRONMENT, "portable")
    assert packed.choose(2048, 2048, total // 2)[0] == "dense"
