#!/usr/bin/env python3
"""Cost of an ELSA step against a plain AdamW step, of a projection, and bytes a parameter.

    python tools/bench_train_step.py models/smollm2-135m --batch-size 4 --seq-len 256

Both steps do the same forward and backward pass on the same batch, in turns within one process;
figures are ratios of medians, with the spread. AdamW is torch's fused one. Prints one JSON object.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import elsa_compile
from elsa_compile.passes import AllocateUniform, PruneElsa
from elsa_compile.passes.adam import Adam
from elsa_compile.passes.admm_constraint import Admm
from elsa_compile.passes.objective import Objective, trainable
from elsa_compile.passes.training_options import has_fast_bf16
from elsa_compile.program import Program


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(device: torch.device, work: Callable[[], Any]) -> float:
    synchronise(device)
    started = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - started


def spread(seconds: list[float]) -> dict[str, float]:
    return {
        "min_s": min(seconds),
        "median_s": statistics.median(seconds),
        "max_s": max(seconds),
    }


def bench_steps(
    program: Program, batch: dict[str, torch.Tensor], options: argparse.Namespace
) -> dict[str, Any]:
    """One mode: AdamW and ELSA steps in turns; the projection by itself."""
    device = torch.device(options.device)
    elsa_compile.apply(program, AllocateUniform(sparsity=options.sparsity))
    modes = {
        "elsa": PruneElsa(interval=options.interval),
        "elsa-l": PruneElsa(interval=options.interval, states="int8", merged_state="bf16"),
    }
    found: dict[str, Any] = {}
    with trainable(program) as named:
        objective = Objective(program, "ce", device, has_fast_bf16(device))
        parameters = [p for _, p in named]

        def gradient() -> None:
            objective(batch).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)

        def clear() -> None:
            for parameter in parameters:
                parameter.grad = None

        adamw = torch.optim.AdamW(parameters, lr=1e-6, fused=True)
        for name, step in modes.items():
            adam = Adam(named, "int8" if step.states == "int8" else "fp32")
            admm = Admm(step, list(program.planned()), adam, 1 << 20)
            admm.share = 0.5
            rows: dict[str, list[float]] = {"gradient": [], "adamw": [], "elsa": [], "project": []}
            for repetition in range(options.repetitions + 1):
                rows["gradient"].append(timed(device, gradient))
                rows["adamw"].append(timed(device, adamw.step))

                def one(adam: Adam = adam, admm: Admm = admm) -> None:
                    admm.add_gradient(1)
                    adam.step(1e-6)
                    admm.after_step(1)  # 1 is no multiple of the interval: no projection

                rows["elsa"].append(timed(device, one))
                clear()

                def project(admm: Admm = admm) -> None:
                    admm.update(0)

                rows["project"].append(timed(device, project))
                print(f"{name}: repetition {repetition}", file=sys.stderr)
            medians = {k: statistics.median(v[1:]) for k, v in rows.items()}
            plain = medians["gradient"] + medians["adamw"]
            ours = medians["gradient"] + medians["elsa"] + medians["project"] / options.interval
            count = sum(p.numel() for p in parameters)
            found[name] = {
                "step_over_adamw": ours / plain,
                "adamw_step_s": plain,
                "elsa_step_s": ours,
                "projection_s": medians["project"],
                "parts": {key: spread(values[1:]) for key, values in rows.items()},
                "state_bytes": adam.state_bytes() + admm.state_bytes(),
                "state_bytes_a_parameter": (adam.state_bytes() + admm.state_bytes()) / count,
                "parameters": count,
            }
            clear()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="Hugging Face folder of a language model")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--sparsity", type=float, default=0.7)
    parser.add_argument("--interval", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    program = elsa_compile.load(options.model)
    if program.module is None or program.kind != "decoder":
        parser.error(f"{options.model} is no language model")
    program.module.to(options.device)
    vocabulary = int((program.config or {})["vocab_size"])
    ids = torch.randint(vocabulary, (options.batch_size, options.seq_len))
    result = bench_steps(program, {"input_ids": ids}, options)
    about = {
        "model": str(options.model),
        "batch_size": options.batch_size,
        "seq_len": options.seq_len,
        "interval": options.interval,
        "threads": torch.get_num_threads(),
        "device": options.device,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    print(json.dumps({**about, "modes": result}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
