"""elsa-run: verify, measure and use a compiled model. Needs no torch.

Arguments in, one call, its result out; results go to standard output, everything else to standard
error. Imports wait until they are needed: `elsa-run --help` must answer at once.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from elsa_compile.runtime import calibrate_command, pack_commands
from elsa_compile.runtime.command_line import Parser, add_windows, print_json, run_command

_EPILOG = """\
examples:
  elsa-run verify build/tiny/model.onnx
  elsa-run eval build/tiny/model.onnx --data valid.txt
  elsa-run generate build/tiny/model.onnx --prompt "The city of"
  elsa-run bench build/tiny/model.onnx --against build/dense/model.onnx
  elsa-run explain model.onnx
  elsa-run pack model.onnx -o packed/model.onnx
  elsa-run calibrate --threads 1

MODEL is an .onnx file, or a folder with a model.onnx in it.
exit codes: 0 done, 2 input, 3 verification failed, 4 model not supported, 130 interrupted.
"""
_VERIFY = """\
Checks a file and exits with 3 when something is wrong: its structure (as hostile input), that
onnxruntime loads it, finite scores, the KV cache against a run without one, a batch against single
rows, and the reference answers that the compiler recorded in elsa_report.json beside it.
"""
_VERIFY_EPILOG = """\
examples:
  elsa-run verify model.onnx
  elsa-run verify model.onnx --json | jq .checks
"""
_EVAL = """\
Measures perplexity. The whole file is one stream of tokens without special tokens, cut into
non-overlapping windows; each is scored alone, and perplexity is exp of the mean negative
log-likelihood of the window - 1 predicted tokens of every window. `elsa-compile eval` gives the
figure of the torch model by the same protocol.
"""
_EVAL_EPILOG = """\
examples:
  elsa-run eval model.onnx --data valid.txt
  elsa-run eval model.onnx --data valid.txt --window 256 --max-windows 64     # a quick figure
  elsa-run eval model.onnx --data valid.txt --tokenizer models/smollm2-135m
"""
_GENERATE = """\
Continues a prompt: always the most probable token, or sampled with --temperature. Text goes to
standard output as it comes, a line with the speed to standard error.
"""
_GENERATE_EPILOG = """\
examples:
  elsa-run generate model.onnx --prompt "The city of"
  elsa-run generate model.onnx --prompt "The city of" --temperature 0.8 --top-p 0.95 --seed 7
"""
_BENCH = """\
Times prefill and decode, and measures load time and memory in a process of its own for each file.
With --against both are timed in turns in one process; each ratio is of two neighbouring runs, and
nothing is called faster that is within the noise. Scores are compared before anything is timed.
"""
_BENCH_EPILOG = """\
examples:
  elsa-run bench model.onnx
  elsa-run bench model.onnx --against dense/model.onnx --threads 1 --repetitions 20
  elsa-run bench model.onnx --against stock --layers --html bench.html
  elsa-run bench model.onnx --against stock-int4 --json > bench.json
  elsa-run bench model.onnx --prefill 32 128 512 --context 128 1024 --json > bench.json
"""

_EXPLAIN = """\
Says where the zeros of a file are, how each weight is stored, which runtimes make use of its zeros
and what they could gain: "pruned, but not faster: why?", for any ONNX file, whoever made it.
Expected gains are looked up in a table of measured kernels; only --measure runs the model.
"""
_EXPLAIN_EPILOG = """\
examples:
  elsa-run explain model.onnx
  elsa-run explain model.onnx --all
  elsa-run explain model.onnx --measure --threads 1
  elsa-run explain model.onnx --json | jq .answer
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `elsa-run`.

    Args:
        argv: arguments; those of the process when None.

    Returns:
        The exit code: 0 done, 2 input, 3 verification failed, 4 not supported, 130 interrupted.
    """
    return run_command("elsa-run", _run, argv)


def _run(arguments: Sequence[str]) -> int:
    """Parse and carry out one command."""
    options = build_parser().parse_args(arguments)
    level = logging.INFO if options.verbose else logging.WARNING
    logging.basicConfig(stream=sys.stderr, level=level, format="%(message)s", force=True)
    command: Callable[[argparse.Namespace], int] = options.command
    return command(options)


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = Parser(
        prog="elsa-run",
        description="Runs, measures and checks compiled models in onnxruntime; needs no torch.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"elsa-run {_version()}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)

    def bare(name: str, brief: str, text: str, epilog: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=brief,
            description=text,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.add_argument("--json", action="store_true", help="print one JSON object")
        made.add_argument("-v", "--verbose", action="store_true", help="say what is being done")
        return made

    def add(name: str, run: Any, brief: str, text: str, epilog: str) -> argparse.ArgumentParser:
        made = bare(name, brief, text, epilog)
        made.set_defaults(command=run)
        made.add_argument("model", metavar="MODEL", type=Path, help=".onnx file or its folder")
        if run not in _RUN_NOTHING:
            made.add_argument(
                "--provider",
                default="auto",
                choices=("auto", "cpu", "cuda"),
                help="where to run; auto: CUDA where it works, else cpu",
            )
            made.add_argument("--threads", type=int, metavar="N", help="default: all cores")
        return made

    verify = add("verify", _verify, "check that a file is sound", _VERIFY, _VERIFY_EPILOG)
    verify.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        help="of the cache and batch checks, relative; default 1e-4, float16 2e-2",
    )
    _add_eval(add("eval", _eval, "perplexity on a text", _EVAL, _EVAL_EPILOG))
    _add_generate(add("generate", _generate, "continue a prompt", _GENERATE, _GENERATE_EPILOG))
    _add_bench(add("bench", _bench, "speed, load time, memory", _BENCH, _BENCH_EPILOG))
    explain = add("explain", _explain, "pruned, but not faster: why?", _EXPLAIN, _EXPLAIN_EPILOG)
    explain.add_argument("--all", action="store_true", help="every weight, not only the largest")
    pack_commands.add_commands(add)
    explain.add_argument(
        "--measure", action="store_true", help="also run it: the gain of each weight"
    )
    explain.add_argument("--threads", type=int, metavar="N", help="of --measure; default all cores")
    brief = "measure this machine's kernel table"
    calibrate_command.add_options(
        bare("calibrate", brief, calibrate_command.TEXT, calibrate_command.EPILOG)
    )
    return parser


def _add_eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="UTF-8 text")
    add_windows(parser, "default: the whole text")
    _add_tokenizer(parser)


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", required=True, metavar="TEXT")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="default 64")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="default 0: always the most probable token",
    )
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="sample among K tokens")
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample among the fewest tokens with probability P together",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of sampling, default 0")
    _add_tokenizer(parser)


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--against",
        metavar="FILE",
        help="reference: a file, or stock (this file without our kernels), or made for the "
        "occasion: stock-fp32 (dense float32), stock-int8 or stock-int4 (best stock quantised)",
    )
    parser.add_argument(
        "--prefill",
        type=int,
        nargs="+",
        metavar="N",
        help="prompt lengths; default 32 128 512, as far as the model goes",
    )
    parser.add_argument(
        "--context",
        type=int,
        nargs="+",
        metavar="N",
        help="context lengths to decode at; default 32 128 512, as far as the model goes",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=16,
        metavar="N",
        help="tokens decoded in a repetition, default 16",
    )
    parser.add_argument("--warmup", type=int, default=2, metavar="N", help="default 2")
    parser.add_argument("--repetitions", type=int, default=10, metavar="N", help="default 10")
    parser.add_argument(
        "--clock",
        default="wall",
        choices=("wall", "cpu"),
        help="cpu: with --threads 1, processor time, for a machine that is busy; default wall",
    )
    parser.add_argument(
        "--layers", action="store_true", help="also time every node: kernel, bytes, roofline"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with a picture")


def _add_tokenizer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="folder with tokenizer.json; default: the model's folder",
    )


def _verify(options: argparse.Namespace) -> int:
    from elsa_compile.runtime import display
    from elsa_compile.runtime.verify import verify

    result = verify(
        options.model,
        provider=options.provider,
        threads=options.threads,
        tolerance=options.tolerance,
    )
    _show(options, result.to_json(), display.verification)
    if options.json and not result.ok:
        # The object with every check is out; a second one with the error would break the promise.
        failed = next(check for check in result.checks if check.ok is False)
        print(f"elsa-run: {options.model}: {failed.name}: {failed.detail}", file=sys.stderr)
        return 3
    result.raise_if_failed()
    return 0


def _eval(options: argparse.Namespace) -> int:
    from elsa_compile.runtime import display
    from elsa_compile.runtime.evaluate import evaluate

    result = evaluate(
        options.model,
        options.data,
        tokenizer=options.tokenizer,
        window=options.window,
        max_windows=options.max_windows,
        bos=options.bos,
        provider=options.provider,
        threads=options.threads,
        progress=_counter("window"),
    )
    _show(options, result, display.evaluation)
    return 0


def _generate(options: argparse.Namespace) -> int:
    from elsa_compile.runtime import display
    from elsa_compile.runtime.generate import Sampling, generate

    sampling = Sampling(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    )
    from elsa_compile.runtime.decoder import open_decoder
    from elsa_compile.runtime.onnx_file import locate
    from elsa_compile.runtime.session import provider_of
    from elsa_compile.runtime.text import Tokenizer

    tokenizer = Tokenizer(options.tokenizer or locate(options.model).parent)
    decoder, file = open_decoder(options.model, options.threads, options.provider)

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    if not options.json:
        write(options.prompt)
    made = generate(
        decoder,
        tokenizer,
        options.prompt,
        options.max_new_tokens,
        sampling,
        None if options.json else write,
    )
    result = {
        "model": str(file.path),
        "prompt": options.prompt,
        **asdict(made),
        "decode_tokens_per_s": made.decode_tokens_per_s,
        "sampling": asdict(sampling),
        "provider": provider_of(decoder.session),
        "threads": options.threads,
    }
    if options.json:
        print_json(result)
    else:
        write("\n")
        print(display.generation(result), file=sys.stderr)
    return 0


def _bench(options: argparse.Namespace) -> int:
    from elsa_compile.runtime import display
    from elsa_compile.runtime.bench import bench

    def say(what: str) -> None:
        print(f"elsa-run: {what}", file=sys.stderr)

    result = bench(
        options.model,
        options.against,
        prefill=options.prefill,
        context=options.context,
        steps=options.steps,
        warmup=options.warmup,
        repetitions=options.repetitions,
        provider=options.provider,
        threads=options.threads,
        layers=options.layers,
        clock=options.clock,
        progress=say,
    )
    if options.html is not None:
        from elsa_compile.runtime.bench_page import write_page

        write_page(result, options.html)
        say(f"wrote {options.html}")
    _show(options, result, display.benchmark)
    return 0


def _explain(options: argparse.Namespace) -> int:
    from elsa_compile.runtime.display_explain import explanation
    from elsa_compile.runtime.explain import explain

    result = explain(options.model, options.measure, options.threads)
    _show(options, result, lambda found: explanation(found, None if options.all else 20))
    return 0


_RUN_NOTHING = (_explain, pack_commands.run_pack, pack_commands.run_unpack)


def _show(
    options: argparse.Namespace, result: dict[str, Any], text: Callable[[dict[str, Any]], str]
) -> None:
    """A result as JSON or as text."""
    if options.json:
        print_json(result)
    else:
        print(text(result))


def _counter(unit: str) -> Callable[[int, int], None] | None:
    """A count on one line of a terminal; nothing when standard error is none."""
    if not sys.stderr.isatty():
        return None

    def show(done: int, total: int) -> None:
        end = "\r" if done < total else "\r\033[K"
        print(f"{unit} {done} of {total}", end=end, file=sys.stderr, flush=True)

    return show


def _version() -> str:
    from elsa_compile import __version__

    return __version__


if __name__ == "__main__":
    sys.exit(main())
