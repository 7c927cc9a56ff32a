"""The native library: really built, compared with numpy."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from elsa_compile.runtime import kernels

SOURCE = Path(__file__).parents[2] / "runtime" / "native"


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Path of a library built from the sources by cmake."""
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("cmake and a C++ compiler are needed to build the library")
    folder = tmp_path_factory.mktemp("native")
    for command in (
        ["cmake", "-S", str(SOURCE), "-B", str(folder), "-DELSA_WERROR=ON"],
        ["cmake", "--build", str(folder)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*elsa_native*.so"), None) or next(folder.glob("*elsa_native*.dylib"))


@pytest.fixture
def loaded(library, monkeypatch):
    monkeypatch.setenv(kernels.ENVIRONMENT, str(library))
    kernels._load.cache_clear()
    yield kernels
    kernels._load.cache_clear()


def test_the_built_library_is_available(loaded):
    assert loaded.available() == (True, "")
    assert set(loaded.cpu_features()) <= set(kernels._FEATURES.values())


CASES = {
    "sorted": ([0, 1, 7], 8, -1),
    "none": ([], 8, -1),
    "all": ([0, 1, 2, 3], 4, -1),
    "too large": ([0, 8], 8, 1),
    "negative": ([-1, 3], 8, 0),
    "twice": ([2, 5, 5], 8, 2),
    "falling": ([2, 1], 8, 1),
    "beyond 32 bits": ([0, 2**40], 2**41, -1),
    "empty tensor": ([0], 0, 0),
}


@pytest.mark.parametrize("name", CASES)
def test_indices_are_checked_alike_by_library_and_numpy(loaded, name):
    indices, size, wanted = CASES[name]
    values = np.array(indices, dtype=np.int64)
    assert loaded.first_bad_index(values, size) == wanted
    assert loaded.first_bad_index_numpy(values, size) == wanted


def test_random_indices_agree_with_numpy(loaded):
    random = np.random.default_rng(0)
    for _ in range(200):
        values = np.sort(random.integers(-1, 40, random.integers(0, 20)))
        if random.random() < 0.5:
            values = np.unique(values)
        expected = kernels.first_bad_index_numpy(values, 38)
        assert loaded.first_bad_index(values, 38) == expected


def test_a_missing_library_is_said_to_be_missing(monkeypatch, tmp_path):
    monkeypatch.setenv(kernels.ENVIRONMENT, str(tmp_path / "none.so"))
    kernels._load.cache_clear()
    ok, reason = kernels.available()
    kernels._load.cache_clear()
    assert not ok
    assert "was not built" in reason


def test_another_interface_version_is_refused(library, monkeypatch):
    monkeypatch.setenv(kernels.ENVIRONMENT, str(library))
    real = kernels.ABI_VERSION
    monkeypatch.setattr(kernels, "ABI_VERSION", 99)
    kernels._load.cache_clear()
    ok, reason = kernels.available()
    kernels._load.cache_clear()
    assert not ok
    assert "wanted 99" in reason
    assert ctypes.CDLL(str(library)).elsa_abi_version() == real
