"""compile(): a model in, a verified ONNX file with its companions out.

    check -> load -> perplexity -> passes -> export -> verify -> report -> publish

Nothing expensive starts before everything cheap is checked; nothing is visible at the output's
place before it is verified.
"""

import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from elsa_compile import data as data_module
from elsa_compile import decode_cost, frontend, genai, outputs, pipeline, verify_export
from elsa_compile import export as export_module
from elsa_compile.documents import check_source
from elsa_compile.errors import UserInputError, VerificationError
from elsa_compile.pass_base import Context
from elsa_compile.program import Program
from elsa_compile.progress import ProgressSink, Silent, Stage
from elsa_compile.recipe import Recipe, preset_names
from elsa_compile.report import Report, make_report, write_report
from elsa_compile.rounded_activations import RoundedActivations
from elsa_compile.runtime import text as text_module
from elsa_compile.runtime.session import ACTIVATIONS
from elsa_compile.sparse_encoding import Mode
from elsa_compile.training_data import training_data
from elsa_compile.write_onnx import Dtype, Format

log = logging.getLogger(__name__)

RECIPE_FILE = "elsa_recipe.yaml"
PLAN_FILE = "elsa_plan.yaml"
DEFAULT_EVAL_WINDOWS = 64


@dataclass(frozen=True, kw_only=True)
class CompileArgs:
    """Everything one compilation is told.

    Attributes:
        model: folder, hub id, file or module; see `frontend.load`.
        output: the .onnx file to write.
        recipe: the passes.
        data: a text or dataset as `documents.documents` takes it, an .npz or .safetensors of
            inputs, or batches from Python.
        eval_data: text to measure perplexity on, before and after; never calibrated on.
        dtype: "fp32", "fp16" or "bf16", how weights are stored.
        sparse_initializers: "auto" (the smallest form of each weight), "always", "never".
        format: "plain", or "packed": weights packed as well, where that is smallest.
        verify: when facts are checked: "each", "end" or "off". The file itself always is.
        dump_ir: folder for the graph as text after every pass.
        window: tokens a window; None takes 512 or the model's longest input.
        max_windows: evaluation windows at most, from the start of the text; None takes all.
        bos: "auto", "yes" or "no": whether windows start with BOS.
        example_inputs: for a module that needs them.
        config: folder with the configuration of a bare checkpoint.
        tokenizer: folder with tokenizer.json, when it is not the model's.
        allow_pickle: open pickled modules, which runs the code they hold.
        device: "auto", "cpu" or "cuda".
        seed: of every random choice.
    """

    model: str | Path | nn.Module
    output: Path
    recipe: Recipe
    data: Path | Iterable[Any] | None = None
    eval_data: Path | None = None
    dtype: Dtype = "fp32"
    sparse_initializers: Mode = "auto"
    format: Format = "plain"
    verify: pipeline.Verify | None = None
    dump_ir: Path | None = None
    window: int | None = None
    max_windows: int | None = DEFAULT_EVAL_WINDOWS
    bos: str = "auto"
    example_inputs: tuple[Tensor, ...] | None = None
    config: Path | None = None
    tokenizer: Path | None = None
    allow_pickle: bool = False
    device: str = "auto"
    seed: int = 0


@dataclass(frozen=True)
class CompileResult:
    """What a compilation made.

    Attributes:
        path: the .onnx file.
        files: all files, the .onnx first.
        program: the pruned program.
        report: everything measured; also in elsa_report.json and .html.
    """

    path: Path
    files: tuple[Path, ...]
    program: Program
    report: Report


def compile(  # noqa: A001  elsa_compile.compile is what people look for
    model: str | Path | nn.Module,
    output: str | Path,
    recipe: Recipe | str | Path = "magnitude",
    data: str | Path | Iterable[Any] | None = None,
    *,
    sparsity: float | None = None,
    quantize: str | None = None,
    eval_data: str | Path | None = None,
    progress: ProgressSink | None = None,
    **options: Any,
) -> CompileResult:
    """Compile a model to ONNX.

        import elsa_compile
        elsa_compile.compile("models/smollm2-135m", "build/model.onnx", "sparsegpt",
                             data="train.txt", eval_data="valid.txt", sparsity=0.5)

    Args:
        model: a folder, hub id, file or module.
        output: the .onnx file.
        recipe: a Recipe, the name of a preset, or a YAML file.
        data: a text file, a folder of `datasets`, `datasets:NAME`, or batches, for recipes that
            need them.
        sparsity: of the recipe's allocation, when it should differ from the recipe's.
        quantize: "int8" or "int4": quantise after the recipe's passes, as --quantize does; int4 is
            compensated where there are data.
        eval_data: text to measure perplexity on.
        progress: who is told; nobody when None.
        **options: the other fields of `CompileArgs`.

    Raises:
        UserInputError: input, recipe or output place that cannot be used.
        UnsupportedModelError: a model that cannot be traced or expressed in ONNX.
        VerificationError: the file does not compute what the torch program does.
    """
    chosen = find_recipe(recipe)
    if sparsity is not None:
        chosen = chosen.with_sparsity(sparsity)
    if quantize is not None:
        chosen = chosen.with_quantization(quantize, has_data=data is not None)
    args = CompileArgs(
        model=model,
        output=Path(output),
        recipe=chosen,
        data=Path(data) if isinstance(data, str) else data,
        eval_data=None if eval_data is None else Path(eval_data),
        **options,
    )
    return run(args, progress or Silent())


def find_recipe(recipe: Recipe | str | Path) -> Recipe:
    """A recipe by itself, by the name of a preset, or by its file."""
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, str) and recipe in preset_names():
        return Recipe.preset(recipe)
    if str(recipe).endswith((".yaml", ".yml")) or Path(recipe).exists():
        return Recipe.load(Path(recipe))
    return Recipe.preset(str(recipe))  # says which presets there are


@dataclass
class _Run:
    """The stages of one compilation, timed."""

    progress: ProgressSink
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)  # beside those of passes

    @contextmanager
    def stage(self, name: str, total: int | None = None, unit: str = "steps") -> Iterator[Stage]:
        with self.progress.stage(name, total, unit) as stage:
            yield stage
        self.seconds[name] = self.seconds.get(name, 0.0) + stage.seconds


def check(args: CompileArgs) -> None:
    """Everything that can be refused before the model is loaded.

    Raises:
        UserInputError: recipe order, missing or unusable data, output place, options.
    """
    source = args.model if isinstance(args.model, (str, Path)) else None
    outputs.check_output(args.output, Path(source) if source is not None else None)
    pipeline.check_order(args.recipe.passes)
    pipeline.check_data(args.recipe.passes, args.data is not None)
    for step in args.recipe.passes:
        step.check()
    if isinstance(args.data, Path) and not data_module.holds_arrays(args.data):
        check_source(args.data)
    elif isinstance(args.data, Path) and not args.data.is_file():
        raise UserInputError(f"data file {args.data} does not exist")
    if args.eval_data is not None:
        data_module.evaluation_text(args.eval_data)
    pick_device(args.device)


def pick_device(device: str) -> torch.device:
    """The device for heavy arithmetic; "auto" is CUDA where there is one."""
    if device not in ("auto", "cpu", "cuda"):
        raise UserInputError(f"--device is {device!r}, wanted auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserInputError("--device cuda: torch finds no CUDA device; use cpu")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def run(args: CompileArgs, progress: ProgressSink) -> CompileResult:
    """Carry out one compilation; `compile` says what can go wrong."""
    check(args)
    if args.data is not None and not isinstance(args.data, Path) and iter(args.data) is args.data:
        args = replace(args, data=list(args.data))  # it is read more than once
    steps = _Run(progress)
    with steps.stage("load and trace"):
        program = frontend.load(
            args.model,
            args.example_inputs,
            config=args.config,
            tokenizer=args.tokenizer,
            allow_pickle=args.allow_pickle,
        )
    accuracy, windows = _evaluation(args, program)
    samples = _samples(args, program)
    work = outputs.work_folder(args.output)
    if accuracy is not None:
        accuracy["dense"] = _perplexity(steps, program, windows, "perplexity, dense")
    ctx = Context(
        samples,
        pick_device(args.device),
        args.seed,
        progress,
        training_data(
            program,
            args.data,
            samples,
            window=args.window,
            bos=args.bos,
            cache=work / "tokens",
            progress=progress,
        ),
        work,
        decode_cost.measure,
    )
    pipeline.run(program, args.recipe.passes, ctx, verify=args.verify, dump=args.dump_ir)
    if args.dtype != "fp32":
        export_module.round_to_half(program, args.dtype)
    if accuracy is not None:
        accuracy["compiled"] = _perplexity(steps, program, windows, "perplexity, compiled")
        if program.activations == "integer":
            with RoundedActivations(program) as active:
                name = "perplexity, rounded activations"
                rounded = _perplexity(steps, program, windows, name)
            if active.products:  # else only lookups are quantised
                accuracy["compiled_rounded"] = rounded
    with outputs.staging(args.output) as folder:
        result = _emit(args, program, steps, folder, accuracy, windows)
    outputs.remove_work(args.output)
    return result


def _evaluation(args: CompileArgs, program: Program) -> tuple[dict[str, Any] | None, Any]:
    """What is to be measured, and the token windows (W, window) for it; None without text."""
    if args.eval_data is None:
        return None, None
    data_module.require_language_model(program, "--eval-data")
    windows = data_module.text_windows(
        program, args.eval_data, args.window, args.max_windows, args.bos
    )
    count = len(windows) * (windows.shape[1] - 1)
    accuracy = {
        "metric": "perplexity",
        "data": args.eval_data.name,
        "protocol": text_module.PROTOCOL,
        "window": int(windows.shape[1]),
        "windows": len(windows),
        "tokens": count,
        "bos": args.bos,
    }
    return accuracy, windows


def _samples(args: CompileArgs, program: Program) -> data_module.Samples | None:
    """The data as samples, when a pass reads them; passes that train read a stream instead."""
    if args.data is None:
        return None
    wanted = any(step.needs_data and not step.trains for step in args.recipe.passes)
    trained = any(step.trains for step in args.recipe.passes)
    if not isinstance(args.data, Path):
        if wanted or program.kind != "decoder":
            return data_module.python_samples(program, args.data)
    elif wanted or (trained and data_module.holds_arrays(args.data)):
        return data_module.load_samples(program, args.data, args.window, args.bos)
    return None


def _perplexity(steps: _Run, program: Program, windows: Any, name: str) -> float:
    with steps.stage(name, len(windows), "windows") as stage:
        value = float(data_module.perplexity(program, windows, stage)["perplexity"])
        steps.progress.metric("perplexity", value, model=name.rpartition(" ")[2])
    return value


def _emit(
    args: CompileArgs,
    program: Program,
    steps: _Run,
    folder: Path,
    accuracy: dict[str, Any] | None,
    windows: Any,
) -> CompileResult:
    """Export into the staging folder, verify there, publish."""
    path = folder / args.output.name
    with steps.stage("export"):
        written = export_module.export(
            program,
            path,
            dtype=args.dtype,
            mode=args.sparse_initializers,
            format=args.format,
            metadata=metadata(program, args.recipe),
        )
    for note in written.notes:
        steps.progress.note(note)
    write_companions(args, program, folder)
    with steps.stage("verify in onnxruntime"):
        probe = verify_export.record_probe(program, args.output.name)
        (folder / outputs.REPORT).write_text(json.dumps({"probe": probe}), encoding="utf-8")
        verification, decoders = _verify(args, program, path)
    verification["checks"] += _perplexity_checks(steps, program, decoders, windows, accuracy)
    failed = [check for check in verification["checks"] if check["ok"] is False]
    verification["ok"] = not failed
    if failed:
        raise VerificationError(
            f"{args.output} was not written: {failed[0]['name']}: {failed[0]['detail']}"
        )
    report = make_report(
        program,
        args.recipe,
        written,
        output=args.output.name,
        accuracy=accuracy,
        verification=verification,
        probe=probe,
        seconds=steps.seconds,
        warnings=[w for r in program.history for w in r.stats.warnings] + steps.warnings,
        dtype=args.dtype,
    )
    write_report(report, folder)
    files = outputs.publish(folder, args.output)
    return CompileResult(args.output, tuple(files), program, report)


def metadata(program: Program, recipe: Recipe) -> dict[str, str]:
    """Entries of the ONNX file's metadata_props."""
    from elsa_compile import __version__

    entries = {
        "elsa_compile.version": __version__,
        "elsa_compile.recipe": recipe.to_yaml(),
        "elsa_compile.source": program.source,
    }
    if program.activations is not None:
        entries[ACTIVATIONS] = program.activations
    return entries


def write_companions(args: CompileArgs, program: Program, folder: Path) -> None:
    """Config, tokenizer, genai_config.json, resolved recipe and plan."""
    from elsa_compile.passes.allocate_plan import plan_to_yaml

    (folder / RECIPE_FILE).write_text(args.recipe.to_yaml(), encoding="utf-8")
    if program.plans:
        (folder / PLAN_FILE).write_text(plan_to_yaml(program), encoding="utf-8")
    own = program.folder is not None and args.output.parent.resolve() == program.folder.resolve()
    if program.folder is not None and not own:
        genai.copy_companions(program.folder, folder)
    if program.config is not None and not own:
        text = json.dumps(program.config, indent=2, default=str)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    if program.kind == "decoder":
        content = genai.genai_config(program, args.output.name)
        text = json.dumps(content, indent=2)
        (folder / "genai_config.json").write_text(text + "\n", encoding="utf-8")


def _verify(args: CompileArgs, program: Program, path: Path) -> tuple[dict[str, Any], list[Any]]:
    """Checks of the staged file as plain values, and its decoders when it is a language model.

    The first computes with the weights' exact values; with quantised ones a second is as
    onnxruntime runs it by default.
    """
    from elsa_compile.runtime.decoder import Decoder
    from elsa_compile.runtime.session import EXACT, session
    from elsa_compile.runtime.verify import verify

    result = verify(path, provider="cpu", tolerance=verify_export.TOLERANCE)
    threads = torch.get_num_threads()
    configs = [EXACT, None] if program.grids() else [None]
    sessions = [session(path, threads, "cpu", config=c, kernels=False) for c in configs]
    opened = sessions[0]
    checks = [*result.checks, verify_export.check_logits(program, opened)]
    content = result.to_json() | {"model": args.output.name}
    content["checks"] = [asdict(check) for check in checks]
    if not data_module.is_language_model(program):
        return content, []
    return content, [Decoder(each, args.output) for each in sessions]


def _perplexity_checks(
    steps: _Run,
    program: Program,
    decoders: list[Any],
    windows: Any,
    accuracy: dict[str, Any] | None,
) -> list[dict[str, Any]]:
    """Perplexity in onnxruntime against torch, on the evaluation text or on made-up tokens.

    accuracy gets "onnxruntime", as it runs by default, and for quantised weights
    "onnxruntime_exact", with exact products.
    """
    from elsa_compile.runtime import evaluate

    if not decoders:
        return []
    if accuracy is None:
        cut = verify_export.made_up_windows(program)
        wanted, what = data_module.perplexity(program, cut)["perplexity"], "made-up tokens"
        found = evaluate.perplexity(decoders[0], cut)["perplexity"]
        return [asdict(verify_export.check_perplexity(wanted, found, what))]
    values = []
    for decoder in decoders:
        with steps.stage("perplexity, onnxruntime", len(windows), "windows") as stage:
            result = evaluate.perplexity(decoder, windows, lambda done, total: stage.advance())  # noqa: B023
            values.append(float(result["perplexity"]))
            steps.progress.metric("perplexity", values[-1], model="onnxruntime")
    accuracy["onnxruntime"] = values[-1]
    what = f"{accuracy['tokens']:,} tokens of {accuracy['data']}"
    if len(values) > 1:
        accuracy["onnxruntime_exact"] = values[0]
        warning = verify_export.rounding_warning(*values)
        if warning is not None:
            steps.progress.warn(warning)
            steps.warnings.append(warning)
    return [asdict(verify_export.check_perplexity(accuracy["compiled"], values[0], what))]


def evaluate_torch(
    model: str | Path | nn.Module,
    data: Path,
    *,
    window: int | None = None,
    max_windows: int | None = None,
    bos: str = "auto",
    progress: ProgressSink | None = None,
    **loading: Any,
) -> dict[str, Any]:
    """Perplexity of the torch model by the protocol of `elsa-run eval`.

    Args:
        model: as for `compile`.
        data: UTF-8 text.
        window: tokens a window; None takes 512 or the model's longest input.
        max_windows: at most so many, from the start; None takes the whole text.
        bos: "auto", "yes" or "no".
        progress: who is told.
        **loading: options of `frontend.load`.

    Returns:
        perplexity, nll (nats a token), windows, window, tokens, protocol, seconds, model, data,
        bos (the token id or None).
    """
    data_module.evaluation_text(data)
    steps = _Run(progress or Silent())
    with steps.stage("load and trace"):
        program = frontend.load(model, **loading)
    data_module.require_language_model(program, "eval")
    windows = data_module.text_windows(program, data, window, max_windows, bos)
    with steps.stage("perplexity", len(windows), "windows") as stage:
        result = data_module.perplexity(program, windows, stage)
    assert program.folder is not None
    start = text_module.bos_token(text_module.Tokenizer(program.folder), bos)
    names = {"model": program.source, "data": str(data), "bos": start}
    return {**names, **result, "protocol": text_module.PROTOCOL}


__all__ = [
    "CompileArgs",
    "CompileResult",
    "check",
    "compile",
    "evaluate_torch",
    "find_recipe",
    "run",
]
