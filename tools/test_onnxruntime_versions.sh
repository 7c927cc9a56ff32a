#!/usr/bin/env bash
# Tests the runtime with several releases of onnxruntime, without torch, each in an environment of its own.
#
#     tools/test_onnxruntime_versions.sh                  # 1.23.2, 1.26.0 and the newest
#     tools/test_onnxruntime_versions.sh 1.24.4 newest
#     PYTHON=python3.12 FOLDER=build/versions tools/test_onnxruntime_versions.sh
#
# Needs the native library beside the sources (runtime/libelsa_native.so), or ELSA_NATIVE_LIBRARY.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${FOLDER:-build/onnxruntime-versions}
tests=(tests/runtime/test_provider.py tests/runtime/test_value_types.py tests/runtime/test_lanes.py
    tests/runtime/test_sparse_kernels.py tests/runtime/test_attention.py)
if [ $# -eq 0 ]; then set -- 1.23.2 1.26.0 newest; fi
failed=()
for version in "$@"; do
    place="$folder/$version"
    package=onnxruntime
    if [ "$version" != newest ]; then package="onnxruntime==$version"; fi
    if [ ! -x "$place/bin/pytest" ]; then
        "${PYTHON:-python3}" -m venv "$place"
        "$place/bin/pip" install -q "$package" numpy onnx tokenizers pytest
    fi
    # No conftest: that of the compiler's tests needs torch.
    echo "== $("$place/bin/python" -c 'import onnxruntime, sys
print("onnxruntime", onnxruntime.__version__, "python", sys.version.split()[0])')"
    PYTHONPATH=$PWD "$place/bin/pytest" -q -p no:cacheprovider --noconftest "${tests[@]}" \
        -W ignore || failed+=("$version")
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}"
    exit 1
fi
echo "all passed"
