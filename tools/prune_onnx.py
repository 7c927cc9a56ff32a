"""Set the smallest entries of every matrix of an ONNX file to zero: for tests of size and speed.

    python tools/prune_onnx.py IN.onnx OUT.onnx --sparsity 0.9

Matrices are pruned one by one by magnitude, lookup tables too, as they are stored (float32 or int8,
dense or sparse). Nothing is trained: what the model says afterwards is
meaningless.
"""

import argparse
from pathlib import Path

import numpy as np

from elsa_compile.runtime.model_writer import every_tensor, writing
from elsa_compile.runtime.onnx_constants import Constants
from elsa_compile.runtime.onnx_file import inspect, load_checked

LEAST_ENTRIES = 4096
TYPES = {"float32": 1, "int8": 3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--sparsity", type=float, default=0.9)
    options = parser.parse_args()
    file = inspect(options.source)
    model = load_checked(file)
    constants = Constants(model, file.path.parent)
    graph = model.graph
    with writing(options.output, False) as writer:
        for held in list(constants):
            if len(held.shape) != 2 or held.elements < LEAST_ENTRIES or held.dtype not in TYPES:
                continue
            if held.form == "packed":
                raise SystemExit(f"{held.name} is packed; unpack the file first")
            values = constants.values(held.name).copy()
            size = np.abs(values.astype(np.float32)).reshape(-1)
            smallest = np.argpartition(size, int(options.sparsity * size.size) - 1)
            values.reshape(-1)[smallest[: int(options.sparsity * size.size)]] = 0
            for tensors in (graph.initializer, graph.sparse_initializer):
                for index in range(len(tensors) - 1, -1, -1):
                    named = getattr(tensors[index], "values", tensors[index])
                    if named.name == held.name:
                        del tensors[index]
            made = graph.initializer.add(
                name=held.name, data_type=TYPES[held.dtype], dims=held.shape
            )
            writer.place(made, values)
        for tensor in every_tensor(model):
            writer.carry(tensor, file.path.parent)
        writer.finish(model)


if __name__ == "__main__":
    main()
