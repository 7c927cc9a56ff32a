"""Instructions that the GPU kernels spend on each non-zero, counted in the compiled library.

    python tools/count_sass.py build/cuda/libelsa_cuda.so
    python tools/count_sass.py libelsa_cuda.so --arch sm_80 --json counts.json

Needs cuobjdump and nvdisasm of the CUDA toolkit on the PATH. Counted is the loop that runs while
packets are left: 4 packets of 8 values for each of the 32 lanes. docs/cuda.md says what an H200
can pay for.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_VALUES = ("float32", "bfloat16", "float16", "int8")  # as sliced32.h numbers them
_KERNEL = re.compile(r"6decodeILNS0_5ValueE(\d)ELi(\d)")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,5}\*/\s+(.*?)\s*;")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("library", type=Path)
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--json", help="write the counts here")
    options = parser.parse_args()
    missing = missing_tools()
    if missing:
        sys.exit(
            f"count_sass: {' and '.join(missing)} not on the PATH; they are in the CUDA toolkit"
        )
    rows = counts(disassembled(options.library, options.arch))
    if not rows:
        sys.exit(f"count_sass: no decode kernels for {options.arch} in {options.library}")
    for row in rows:
        print(
            f"{row['values']:8} {row['tokens']} tokens: {row['per_nonzero']:5.2f} instructions a "
            f"non-zero, {row['loads']} loads of {row['values_a_lane']} values"
        )
    if options.json:
        Path(options.json).write_text(json.dumps({"arch": options.arch, "rows": rows}, indent=1))
    return 0


def missing_tools() -> list[str]:
    return [tool for tool in ("cuobjdump", "nvdisasm") if shutil.which(tool) is None]


def disassembled(library: Path, arch: str) -> str:
    """The machine code of all kernels for one architecture, as text."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["cuobjdump", "-xelf", "all", str(library.resolve())]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        return "\n".join(
            subprocess.run(
                ["nvdisasm", "-c", str(file)], check=True, capture_output=True, text=True
            ).stdout
            for file in sorted(Path(folder).glob(f"*{arch}.cubin"))
        )


def counts(text: str) -> list[dict[str, Any]]:
    """One row for each decode kernel: its innermost loop with the most multiply-adds.

    Of two loops alike the shorter one, which runs while all packets it loads are there.
    """
    rows = []
    for part in re.split(r"\n\.text\.", text)[1:]:
        kernel = _KERNEL.search(part.split(":", 1)[0])
        if kernel is None:
            continue
        tokens = int(kernel[2])
        body = min(loops(part), key=lambda each: (-fused(each), len(each)))
        nonzeros = fused(body) // tokens
        rows.append(
            {
                "values": _VALUES[int(kernel[1])],
                "tokens": tokens,
                "instructions": len(body),
                "values_a_lane": nonzeros,
                "per_nonzero": round(len(body) / nonzeros, 2),
                "loads": sum("LDG" in each for each in body),
            }
        )
    return sorted(rows, key=lambda row: (_VALUES.index(row["values"]), row["tokens"]))


def loops(text: str) -> list[list[str]]:
    """Instructions of every loop: from a label to a branch back to it."""
    lines = text.splitlines()
    labels = {line.rstrip(":"): at for at, line in enumerate(lines) if line.startswith(".L_")}
    found = []
    for end, line in enumerate(lines):
        back = re.search(r"BRA `\((\.L_\w+)\)", line)
        start = labels.get(back[1]) if back else None
        if start is not None and start < end:
            inside = [_INSTRUCTION.search(each) for each in lines[start : end + 1]]
            found.append([each[1] for each in inside if each is not None])
    return found


def fused(body: list[str]) -> int:
    """Multiply-adds in a loop."""
    return sum("FFMA" in each for each in body)


if __name__ == "__main__":
    sys.exit(main())
