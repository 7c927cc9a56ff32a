"""elsa-compile: arguments -> CompileArgs -> compiler.run; no other logic.

Imports wait until they are needed: `elsa-compile --help` must answer at once.
"""

import argparse
import contextlib
import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from elsa_compile.runtime.command_line import Parser, add_windows, print_json, run_command
from elsa_compile.runtime.errors import UserInputError

_DESCRIPTION = """\
Compiles a PyTorch model into a pruned ONNX file that onnxruntime executes, and checks it there.

MODEL is a Hugging Face folder or hub id, a GGUF file, an exported program (.pt2), or a checkpoint
(.pt, .pth, .safetensors) with its config.json beside it or in --config DIR.
"""
_EPILOG = """\
examples:
  elsa-compile models/smollm2-135m -o build/model.onnx --sparsity 0.5 --data train.txt
  elsa-compile models/smollm2-135m -o build/model.onnx --preset elsa --sparsity 0.8 \\
      --data train.txt --eval-data valid.txt
  elsa-compile resnet.pt2 -o build/resnet.onnx --preset magnitude --set allocate-uniform.pattern=2:4
  elsa-compile MODEL -o model.onnx --plan edited_plan.yaml       # sparsity of each weight, by hand
  elsa-compile MODEL -o model.onnx --dry-run                     # what it will take
  elsa-compile eval MODEL --data valid.txt                       # perplexity of the torch model
  elsa-compile --list-passes
  elsa-compile --explain prune-sparsegpt

Beside OUT.onnx lie its tokenizer and config, genai_config.json, elsa_recipe.yaml, elsa_plan.yaml
and the report (elsa_report.json, elsa_report.html). `elsa-run` measures and uses the result.
exit codes: 0 done, 2 input, 3 verification failed, 4 model not supported, 130 interrupted.
"""
_EVAL_DESCRIPTION = """\
Measures perplexity of a PyTorch model on a text by the protocol of `elsa-run eval`, so that the two
figures can be compared: the whole file is one stream of tokens without special tokens, cut into
non-overlapping windows; each is scored alone; perplexity is exp of the mean negative log-likelihood
of the window - 1 predicted tokens of every window.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `elsa-compile`.

    Args:
        argv: arguments; those of the process when None.

    Returns:
        The exit code: 0 done, 2 input, 3 verification failed, 4 not supported, 130 interrupted.
    """
    return run_command(
        "elsa-compile",
        _run,
        argv,
        interrupted="interrupted; nothing was written",
        out_of_memory="out of memory; --dry-run shows what the model needs",
    )


def _terminated(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def _run(arguments: list[str]) -> int:
    _quiet()
    if arguments and arguments[0] == "eval":
        return _eval(_eval_parser().parse_args(arguments[1:]))
    options = build_parser().parse_args(arguments)
    level = logging.INFO if options.verbose else logging.WARNING
    logging.basicConfig(stream=sys.stderr, level=level, format="%(message)s", force=True)
    if options.list_passes:
        return _list_passes()
    if options.explain is not None:
        from elsa_compile.pass_base import explain, find_pass

        print(explain(find_pass(options.explain)))
        return 0
    if options.model is None:
        raise UserInputError("give the model to compile; see elsa-compile --help")
    if options.output is None:
        raise UserInputError("give the file to write with -o, as in -o build/model.onnx")
    return _compile(options)


def _quiet() -> None:
    """Other libraries' advice and bars are not about the user's model."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    # Threads that wait by spinning cost a factor of 20 when another process needs a core (a step of
    # 0.46 s took 12 s, two cores, November 2026). OpenMP reads this when torch loads it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    warnings.simplefilter("ignore")
    with contextlib.suppress(ValueError):  # outside of the main thread, as tests may be
        signal.signal(signal.SIGTERM, _terminated)


def build_parser() -> argparse.ArgumentParser:
    """The options of a compilation."""
    parser = Parser(
        prog="elsa-compile",
        usage="elsa-compile MODEL -o OUT.onnx [options]\n"
        "       elsa-compile eval MODEL --data FILE [options]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"elsa-compile {_version()}")
    parser.add_argument("model", metavar="MODEL", nargs="?", help="what to compile")
    parser.add_argument("-o", "--output", type=Path, metavar="OUT.onnx", help="file to write")
    _add_recipe(parser.add_argument_group("what is done"))
    _add_data(parser.add_argument_group("text and measuring"))
    export = parser.add_argument_group("the file")
    export.add_argument(
        "--dtype",
        default="fp32",
        choices=("fp32", "fp16", "bf16"),
        help="how weights are stored, default fp32; arithmetic is float32 in all; bf16 halves the "
        "file of what is not quantised, and is what most checkpoints come in",
    )
    export.add_argument(
        "--sparse-initializers",
        default="auto",
        choices=("auto", "always", "never"),
        help="auto, the default: for each weight the smallest form, dense or sparse",
    )
    export.add_argument(
        "--format",
        default="plain",
        choices=("plain", "packed"),
        help="packed: also one bit an entry and the values, decoded by functions in the file; "
        "elsa-compile's kernels run it packed (docs/packed-format.md)",
    )
    _add_loading(parser.add_argument_group("the model"))
    _add_running(parser.add_argument_group("running"))
    shown = parser.add_argument_group("instead of compiling")
    shown.add_argument(
        "--dry-run", action="store_true", help="check everything, estimate memory, time and size"
    )
    shown.add_argument("--list-passes", action="store_true", help="all passes, one line each")
    shown.add_argument("--explain", metavar="PASS", help="a pass with all its options")
    return parser


def _add_recipe(group: Any) -> None:
    group.add_argument(
        "--preset",
        metavar="NAME",
        help="elsa and elsa-l (they train, and are the most accurate), sparsegpt, alps, wanda, "
        "magnitude; default: sparsegpt with --data, magnitude without",
    )
    group.add_argument("--recipe", type=Path, metavar="FILE", help="passes in YAML, own order")
    group.add_argument(
        "--sparsity", type=float, metavar="S", help="fraction of zeros in [0, 1), as in 0.8"
    )
    group.add_argument(
        "--quantize",
        choices=("int8", "int4"),
        help="also quantise, last: int8, or int4 in groups of 32, compensated if there is --data; "
        "the head and embeddings int8; see --explain quantize-weights",
    )
    group.add_argument(
        "--plan",
        type=Path,
        metavar="FILE",
        help="sparsity of each weight, an edited elsa_plan.yaml",
    )
    group.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PASS.OPTION=VALUE",
        help="one option of one pass; may be repeated",
    )


def _add_data(group: Any) -> None:
    group.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="calibration: UTF-8 text, .jsonl, a folder saved by datasets, datasets:NAME from the "
        "hub, or .npz / .safetensors",
    )
    group.add_argument(
        "--eval-data", type=Path, metavar="FILE", help="text to measure perplexity on"
    )
    add_windows(group, "default 64")


def _add_loading(group: Any) -> None:
    group.add_argument("--config", type=Path, metavar="DIR", help="folder with config.json")
    group.add_argument("--tokenizer", type=Path, metavar="DIR", help="folder with tokenizer.json")
    group.add_argument(
        "--allow-pickle",
        action="store_true",
        help="open a pickled module; this runs whatever code the file holds",
    )


def _add_running(group: Any) -> None:
    group.add_argument(
        "--verify",
        default="each",
        choices=("each", "end", "off"),
        help="when the facts about the program are checked: after each pass (the default), at the "
        "end, or not; the written file is always checked",
    )
    group.add_argument("--dump-ir", type=Path, metavar="DIR", help="the graph as text after passes")
    group.add_argument("--metrics", type=Path, metavar="FILE", help="progress as JSON lines")
    group.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    group.add_argument("--threads", type=int, metavar="N", help="default: all cores")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="default 0")
    group.add_argument("--json", action="store_true", help="print one JSON object, not tables")
    group.add_argument("-v", "--verbose", action="store_true", help="say what is being done")


def _eval_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="elsa-compile eval",
        description=_EVAL_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="as for elsa-compile")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="UTF-8 text")
    add_windows(parser, "default: the whole text")
    _add_loading(parser)
    parser.add_argument("--metrics", type=Path, metavar="FILE", help="progress as JSON lines")
    parser.add_argument("--threads", type=int, metavar="N", help="default: all cores")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _list_passes() -> int:
    import inspect

    from elsa_compile.pass_base import registered_passes

    known = registered_passes()
    width = max(len(name) for name in known)
    for name, cls in known.items():
        print(f"{name:{width}}  {(inspect.getdoc(cls) or '').splitlines()[0]}")
    return 0


def _check_numbers(options: argparse.Namespace) -> None:
    """Refuse counts before the model is loaded, and set the number of threads."""
    from elsa_compile.runtime.text import check_numbers

    check_numbers(options.window, options.max_windows)
    count = options.threads
    if count is None:
        return
    if count < 1:
        raise UserInputError(f"--threads is {count}, wanted at least 1")
    import torch

    torch.set_num_threads(count)


def _compile(options: argparse.Namespace) -> int:
    from elsa_compile import compiler
    from elsa_compile.progress import Interrupts, Tee, open_progress
    from elsa_compile.report import render_table

    _check_numbers(options)
    windows = options.max_windows
    args = compiler.CompileArgs(
        model=options.model,
        output=options.output,
        recipe=_recipe(options),
        data=options.data,
        eval_data=options.eval_data,
        dtype=options.dtype,
        sparse_initializers=options.sparse_initializers,
        format=options.format,
        verify=options.verify,
        dump_ir=options.dump_ir,
        window=options.window,
        max_windows=compiler.DEFAULT_EVAL_WINDOWS if windows is None else windows,
        bos=options.bos,
        config=options.config,
        tokenizer=options.tokenizer,
        allow_pickle=options.allow_pickle,
        device=options.device,
        seed=options.seed,
    )
    if options.dry_run:
        from elsa_compile.estimate import estimate

        found = estimate(args)
        if options.json:
            print_json(found.to_json())
        else:
            print(found.to_text())
        return 0
    with Tee(open_progress("auto", options.metrics), Interrupts()) as progress:
        result = compiler.run(args, progress)
    if options.json:
        print(result.report.to_json())
    else:
        print(render_table(result.report))
        print(f"\n{result.path} and {len(result.files) - 1} files beside it; "
              f"elsa_report.html has the plots.")  # fmt: skip
    return 0


def _recipe(options: argparse.Namespace) -> Any:
    """The recipe that the options describe together."""
    from elsa_compile.recipe import Recipe

    if options.recipe is not None and options.preset is not None:
        raise UserInputError("--recipe and --preset exclude each other; give one of them")
    if options.recipe is not None:
        recipe = Recipe.load(options.recipe)
    else:
        recipe = Recipe.preset(options.preset or ("sparsegpt" if options.data else "magnitude"))
    if options.plan is not None and options.sparsity is not None:
        raise UserInputError("--plan holds the sparsity of each weight; leave --sparsity out")
    if options.sparsity is not None:
        recipe = recipe.with_sparsity(options.sparsity)
    if options.plan is not None:
        recipe = recipe.with_plan(options.plan)
    if options.quantize is not None:
        recipe = recipe.with_quantization(options.quantize, has_data=options.data is not None)
    return recipe.with_settings(options.set)


def _eval(options: argparse.Namespace) -> int:
    from elsa_compile import compiler
    from elsa_compile.progress import open_progress

    _check_numbers(options)
    with open_progress("auto", options.metrics) as progress:
        result = compiler.evaluate_torch(
            options.model,
            options.data,
            window=options.window,
            max_windows=options.max_windows,
            bos=options.bos,
            progress=progress,
            config=options.config,
            tokenizer=options.tokenizer,
            allow_pickle=options.allow_pickle,
        )
    if options.json:
        print_json(result)
    else:
        print(f"perplexity {result['perplexity']:.4f} on {result['tokens']:,} tokens of "
              f"{options.data} ({result['windows']} windows of {result['window']})")  # fmt: skip
    return 0


def _version() -> str:
    from elsa_compile import __version__

    return __version__


if __name__ == "__main__":
    sys.exit(main())
