"""Hugging Face folders, hub ids and GGUF files -> a plain nn.Module in float32."""

import contextlib
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from elsa_compile.errors import UnsupportedModelError, UserInputError

log = logging.getLogger(__name__)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and advice of transformers; they speak of other things."""
    import transformers

    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            transformers.logging.set_verbosity(before)


def read_config(folder: Path, name: str = "config.json") -> Any:
    """The transformers configuration of a folder, kept in its file `name`.

    Raises:
        UserInputError: missing or unreadable.
        UnsupportedModelError: an architecture transformers does not know.
    """
    from transformers import AutoConfig

    path = folder / name
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserInputError(
            f"{folder} holds no config.json; give a Hugging Face model folder, or the folder with "
            "the config by --config"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserInputError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict) or "model_type" not in content:
        raise UserInputError(f"{path} names no model_type; it is no transformers configuration")
    return make_config(content, str(path), AutoConfig)


def make_config(content: Mapping[str, Any], where: str, auto: Any = None) -> Any:
    """A configuration object from its JSON content."""
    from transformers import AutoConfig

    auto = auto or AutoConfig
    content = dict(content)
    kind = content.pop("model_type")
    if "auto_map" in content:
        raise UnsupportedModelError(
            f"{where}: the model brings its own code (auto_map), which is never run; load it in "
            "Python and pass the module to elsa_compile.compile"
        )
    try:
        with quiet():
            return auto.for_model(kind, **content)
    except ValueError as error:
        if "nrecognized model" in str(error):
            raise UnsupportedModelError(
                f"{where}: transformers does not know the architecture {kind!r}"
            ) from None
        raise UserInputError(f"{where}: {_one_line(error)}") from None
    except Exception as error:  # a configuration class may raise anything on odd values
        raise UserInputError(f"{where}: {_one_line(error)}") from None


def build(config: Any, where: str) -> nn.Module:
    """An untrained model of the architecture that the configuration names."""
    auto = _auto_class(config)
    try:
        with quiet(), torch.random.fork_rng(devices=[]):
            made = auto.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
            model: nn.Module = made.eval()
            return model
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        if "scaled_dot_product_attention" in str(error) or "sdpa" in str(error):
            raise UnsupportedModelError(f"{where}: {_one_line(error)}") from None
        raise UnsupportedModelError(
            f"{where}: no model can be built from this configuration: {_one_line(error)}"
        ) from None


def _auto_class(config: Any) -> Any:
    """The transformers class for a configuration: causal LM where there is one, else plain."""
    import transformers

    names = getattr(config, "architectures", None) or []
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{config.model_type} is an encoder-decoder model; this release compiles decoders and "
            "encoders"
        )
    causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    wants_causal = any(n.endswith(("ForCausalLM", "LMHeadModel")) for n in names)
    if causal and (wants_causal or not names):
        return transformers.AutoModelForCausalLM
    for suffix, auto in (
        ("ForMaskedLM", transformers.AutoModelForMaskedLM),
        ("ForSequenceClassification", transformers.AutoModelForSequenceClassification),
        ("ForTokenClassification", transformers.AutoModelForTokenClassification),
    ):
        if any(n.endswith(suffix) for n in names):
            return auto
    return transformers.AutoModel


def from_folder(folder: Path) -> nn.Module:
    """Load a Hugging Face model folder: safetensors first, else .bin with weights_only."""
    from elsa_compile import checkpoints

    config = read_config(folder)
    weights = weight_files(folder)
    state: dict[str, Tensor] = {}
    for path in weights:
        state |= checkpoints.read_state(path)
    model = build(config, str(folder / "config.json"))
    checkpoints.fill(model, state, str(weights[0] if len(weights) == 1 else folder))
    return model


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder, all shards of them.

    Raises:
        UserInputError: there are none, or a shard is missing.
    """
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{stem}.index.json"
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
            except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
                raise UserInputError(f"{index} is no index of shards: {error}") from None
            shards = [folder / Path(str(name)).name for name in names]
            missing = [path.name for path in shards if not path.is_file()]
            if missing:
                raise UserInputError(
                    f"{folder} lacks {missing[0]}, one of the {len(shards)} files that "
                    f"{index.name} names ({len(missing)} missing)"
                )
            return shards
        if (folder / stem).is_file():
            return [folder / stem]
    raise UserInputError(f"{folder} holds neither model.safetensors nor pytorch_model.bin")


def from_gguf(path: Path) -> tuple[nn.Module, Path]:
    """Dequantise a GGUF file; its tokenizer goes to a temporary folder that is returned.

    A model loaded from GGUF counts as quantised and refuses to be saved or trained: its weights are
    copied into a plain one.
    """
    import transformers

    try:
        with open(path, "rb") as stream:
            magic = stream.read(4)
        if magic != b"GGUF":
            raise UserInputError(f"{path} is no GGUF file (it starts with {magic!r})")
        with quiet():
            return _dequantised(path)
    except UserInputError:
        raise
    except ImportError as error:
        raise UserInputError(
            f"{path}: reading GGUF needs more packages ({_one_line(error)}); pip install "
            "gguf accelerate"
        ) from None
    except (KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:
        if "not supported" in str(error) and "architecture" in str(error):
            raise UnsupportedModelError(
                f"{path}: transformers {transformers.__version__} cannot read this GGUF "
                f"architecture: {_one_line(error)}"
            ) from None
        raise UserInputError(
            f"{path} cannot be read as GGUF; it is truncated or corrupted: {_one_line(error)}"
        ) from error


def _dequantised(path: Path) -> tuple[nn.Module, Path]:
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from elsa_compile import checkpoints

    source: dict[str, Any] = {
        "pretrained_model_name_or_path": str(path.parent),
        "gguf_file": path.name,
        "local_files_only": True,
    }
    dense: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        dense["quantization_config"] = transformers.GgufConfig(dequantize=True)
    packed = AutoModelForCausalLM.from_pretrained(**source, **dense, dtype=torch.float32)
    config = packed.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = build(config, str(path))
    checkpoints.fill(model, dict(packed.state_dict()), str(path))
    folder = Path(tempfile.mkdtemp(prefix="elsa-gguf-"))
    _clean_at_exit(folder)
    config.save_pretrained(folder)
    if (path.parent / "tokenizer.json").is_file():
        return model, _copied(path.parent, folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    return model, folder


def _copied(source: Path, folder: Path) -> Path:
    """A tokenizer beside the GGUF file is the original; the conversion drops digit splitting."""
    import shutil

    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (source / name).is_file():
            shutil.copy(source / name, folder / name)
    return folder


def _clean_at_exit(folder: Path) -> None:
    import atexit
    import shutil

    atexit.register(shutil.rmtree, folder, ignore_errors=True)


def download(name: str) -> Path:
    """The local folder of a hub model, fetched when it is not in the cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise UserInputError(
            f"{name} is no local path and cannot be fetched from the hub{offline}: "
            f"{_one_line(error)}"
        ) from None


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return (text[:240] + "...") if len(text) > 240 else text or type(error).__name__
