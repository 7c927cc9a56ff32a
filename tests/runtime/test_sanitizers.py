"""The kernels and the checks of packed bytes under the address and undefined sanitizers."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "runtime" / "native"


def run(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder of the programs."""
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("cmake and a C++ compiler are needed")
    folder = tmp_path_factory.mktemp("sanitized")
    probe = folder / "probe.cpp"
    probe.write_text("int main() {}")
    linked = subprocess.run(
        ["c++", "-fsanitize=address,undefined", probe, "-o", folder / "probe"], capture_output=True
    )
    if linked.returncode:
        pytest.skip("this compiler has no sanitizers")
    run("cmake", "-S", SOURCE, "-B", folder, "-DELSA_SANITIZE=ON", "-DELSA_WERROR=ON")
    run("cmake", "--build", folder)
    return folder


def test_kernels_stay_inside_their_buffers(built):
    assert ", 0 faults" in run(built / "kernels_check")


def test_attention_stays_inside_its_buffers(built):
    assert ", 0 faults" in run(built / "attention_check")


@pytest.mark.skipif(sys.platform != "linux", reason="the GPU is emulated on Linux only")
def test_gpu_kernels_are_right_and_stay_inside_their_buffers(built):
    # Every fourth weight; without the argument, and in ctest, all of them.
    assert run(built / "cuda" / "emulated_check", "quick").endswith(" weights, 0 faults\n")


def test_a_million_damaged_weights_are_refused_or_survived(built):
    said = run(built / "fuzz_packed", 1000000)
    assert said.startswith("1000000 inputs")


def test_weights_packed_in_files_come_out_right_or_are_refused(built):
    assert run(built / "fuzz_bitmask", 200000).startswith("200000 inputs")
