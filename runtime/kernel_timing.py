"""Times a product of tokens and weights inside onnxruntime: dense, and on the sparse kernels.

A sweep is a model of many matrices of one shape, multiplied with tokens, so that the weights come
from memory as those of a whole model do. Three products share an input, as q, k and v do: the
execution provider runs products of one input as one node. Sessions of it are timed in turns, and
each ratio is of two runs that followed each other. Used by `elsa-run calibrate` and by
tools/bench_kernels.py.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elsa_compile.runtime import provider, reference
from elsa_compile.runtime.errors import VerificationError

WARMUP = 2
SHARED = 3  # products of one input
# Of the largest value, beside what the order of a sum may do: rounding of weights, and for int8 of
# the activations.
_ALLOWED = {"float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-10, "int8": 0.02}
Array = NDArray[np.float32]
Clock = Callable[[], float]


def sparse_matrices(
    shape: tuple[int, int], sparsity: float, count: int, random: np.random.Generator
) -> list[Array]:
    """Matrices (K, N) float32 with zeros at random places.

    Args:
        shape: (K, N).
        sparsity: fraction of zeros.
        count: how many.
        random: the same gives the same.
    """
    made = []
    for _ in range(count):
        weight = random.standard_normal(shape, dtype=np.float32)
        weight[random.random(shape, dtype=np.float32) < sparsity] = 0
        made.append(weight)
    return made


def sweep_model(matrices: Sequence[Array], copies: int, int8: bool = False) -> bytes:
    """An ONNX file of x (tokens, K) times each of the matrices (K, N): y0, and the sum of all.

    Args:
        matrices: different ones.
        copies: products. Beyond the number of matrices each has one of them with its inputs turned
            by one more place: onnxruntime keeps equal weights once.
        int8: weights rounded to int8 with a scale for each output, behind a DequantizeLinear.
    """
    from onnx import TensorProto, helper, numpy_helper

    columns = matrices[0].shape[0]
    groups = -(-copies // SHARED)
    inputs = [f"x{group}" for group in range(groups)]
    # Copies of the tokens, which no optimisation sees through.
    nodes = [
        helper.make_node("Concat", ["x"] * groups, ["all"], axis=0),
        helper.make_node("Split", ["all"], inputs, axis=0, num_outputs=groups),
    ]
    held = []
    for i in range(copies):
        weight = np.roll(matrices[i % len(matrices)], i // len(matrices), axis=0)
        read = f"w{i}"
        if int8:
            scales = np.maximum(np.abs(weight).max(axis=0), np.float32(1e-30)) / 127
            whole = np.rint(weight / scales).astype(np.int8)
            held.append(numpy_helper.from_array(whole, f"w{i}"))
            held.append(numpy_helper.from_array(scales.astype(np.float32), f"s{i}"))
            nodes.append(
                helper.make_node("DequantizeLinear", [f"w{i}", f"s{i}"], [f"d{i}"], axis=1)
            )
            read = f"d{i}"
        else:
            held.append(numpy_helper.from_array(weight, f"w{i}"))
        nodes.append(
            helper.make_node("MatMul", [inputs[i // SHARED], read], [f"y{i}"], name=f"n{i}")
        )
    # One output for all: handing hundreds to Python would count as time of the products.
    nodes.append(helper.make_node("Sum", [f"y{i}" for i in range(copies)], ["y"]))
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("y0", "y")]
    tokens = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", columns])
    graph = helper.make_graph(nodes, "sweep", [tokens], outputs, held)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    data: bytes = made.SerializeToString()
    return data


def open_sweep(data: bytes, threads: int, choice: Mapping[str, str] | None) -> Any:
    """A session, with our provider and these options of it, or plain.

    Raises:
        UserInputError: the library is not there.
    """
    import onnxruntime as ort

    ort.set_default_logger_severity(4)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    # Idle threads of one session would spin on the cores another is timed on.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if choice is None:
        return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    options.add_provider_for_devices(provider.devices(ort), dict(choice))
    return ort.InferenceSession(data, options, enable_fallback=0)


def check_sweep(opened: Any, x: Array, weight: Array, dtype: str) -> None:
    """The first product against float64.

    Args:
        opened: a session of a sweep.
        x: (tokens, K).
        weight: (K, N), the first matrix.
        dtype: its values are rounded to.

    Raises:
        VerificationError: it is off by more than rounding does.
    """
    found = opened.run(["y0"], {"x": x})[0]
    truth = reference.matmul(x, reference.stored(weight.T, dtype))
    # int8 weights meet int8 activations where there are few tokens.
    bound = reference.error_bound(x, weight.T) + _ALLOWED[dtype] * np.abs(truth).max()
    worst = float((np.abs(found - truth) / bound).max())
    if not worst <= 1:
        raise VerificationError(
            f"a product of {dtype} weights {weight.shape} is off by {worst:.3g} times what "
            "rounding may do, so it is not timed; report it"
        )


def time_in_turns(
    sessions: Sequence[Any], x: Array, repetitions: int, clock: Clock
) -> list[list[float]]:
    """Seconds of each repetition of each session; who goes first alternates."""
    seconds: list[list[float]] = [[] for _ in sessions]
    for repetition in range(repetitions + WARMUP):
        order = list(range(len(sessions)))
        for index in order if repetition % 2 == 0 else reversed(order):
            started = clock()
            sessions[index].run(["y"], {"x": x})
            if repetition >= WARMUP:
                seconds[index].append(clock() - started)
    return seconds


def pick_clock(threads: int) -> tuple[str, Clock]:
    """The thread's processor time where one thread does all the work, else wall time.

    The former says nearly the same on a machine that is also busy with other things.
    """
    return ("cpu", time.thread_time) if threads == 1 else ("wall", time.perf_counter)


def paired_ratios(before: Sequence[float], after: Sequence[float]) -> list[float]:
    """Ratios of runs that followed each other."""
    return [b / a for b, a in zip(before, after, strict=True)]


def middle(seconds: Sequence[float], copies: int) -> float:
    """Median seconds of one product of a sweep."""
    return statistics.median(seconds) / copies
