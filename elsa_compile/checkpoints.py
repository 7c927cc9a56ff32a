"""State dicts: reading them safely, and fitting them to the model their config describes."""

import logging
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from elsa_compile.errors import UnsupportedModelError, UserInputError

log = logging.getLogger(__name__)

# Keys under which training scripts keep a state dict beside other things, and its configuration.
_STATE_KEYS = ("state_dict", "model_state_dict", "model", "module", "weights")
_DEPTH = 3  # dicts within dicts, before the state dict
_CONFIG_KEYS = ("config", "model_config", "hf_config")
_PICKLED = (
    "{path} holds a pickled {what}, and opening it runs code from the file; save the state dict "
    "instead (torch.save(model.state_dict(), ...)), or pass --allow-pickle if you trust it"
)


def load(
    path: Path, config: str | Path | None, allow_pickle: bool
) -> tuple[nn.Module, Path | None]:
    """Load a checkpoint file.

    Args:
        path: .pt, .pth, .bin or .safetensors.
        config: folder or config.json; None looks inside the checkpoint, then beside it.
        allow_pickle: open a pickled module.

    Returns:
        The module, and the folder of its configuration (None when that was inside).

    Raises:
        UserInputError: unreadable, refused, or weights that do not fit the configuration.
    """
    from elsa_compile import hub_models

    content = {} if path.suffix == ".safetensors" else read_torch(path, allow_pickle)
    if isinstance(content, nn.Module):
        return content.eval(), path.parent if (path.parent / "tokenizer.json").is_file() else None
    state = read_state(path) if path.suffix == ".safetensors" else _state_of(content, path)
    folder: Path | None = path.parent
    inside = next((content[k] for k in _CONFIG_KEYS if isinstance(content.get(k), Mapping)), None)
    if config is not None:
        given = Path(config)
        folder = given.parent if given.is_file() else given
        made = hub_models.read_config(folder, given.name if given.is_file() else "config.json")
    elif inside is not None:
        if "model_type" not in inside:
            raise UserInputError(f"{path}: the config inside names no model_type")
        made = hub_models.make_config(inside, f"{path}: the config inside")
        folder = path.parent if (path.parent / "tokenizer.json").is_file() else None
    elif (path.parent / "config.json").is_file():
        made = hub_models.read_config(path.parent)
    else:
        raise UserInputError(
            f"{path} is a bare state dict and no config.json lies beside it; give the folder with "
            "the model's config by --config, or compile the module from Python"
        )
    model = hub_models.build(made, str(folder or path))
    fill(model, state, str(path))
    return model, folder


def read_torch(path: Path, allow_pickle: bool = False) -> Any:
    """Content of a torch file, without running code unless `allow_pickle`.

    Raises:
        UserInputError: TorchScript, a pickled object, a truncated or foreign file.
    """
    import pickle

    from elsa_compile.frontend import TORCHSCRIPT, _first_line, check_sums

    if path.stat().st_size == 0:
        raise UserInputError(f"{path} is empty")
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
            raise UserInputError(TORCHSCRIPT.format(what=str(path)))
        if not any(name.endswith("data.pkl") for name in names):
            raise UserInputError(f"{path} is a zip archive, but not one that torch.save wrote")
        try:
            with zipfile.ZipFile(path) as archive:
                check_sums(archive)
        except ValueError as error:
            raise _unreadable(path, str(error)) from None
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=None)
    except (pickle.UnpicklingError, AttributeError) as error:
        if "Weights only load failed" not in str(error) and "GLOBAL" not in str(error):
            raise _unreadable(path, _first_line(error)) from None
        if not zipfile.is_zipfile(path) and not _looks_pickled(path):
            raise _unreadable(path, "neither a zip archive nor a pickle") from None
        if not allow_pickle:
            raise UserInputError(_PICKLED.format(path=path, what="object")) from None
    except (KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:
        raise _unreadable(path, _first_line(error)) from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=False)
    except (KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:  # the file's own code may raise anything
        raise UserInputError(
            f"{path} cannot be unpickled: {_first_line(error)}; the code of its classes must be "
            "importable here"
        ) from error
    return content


def _looks_pickled(path: Path) -> bool:
    with open(path, "rb") as stream:
        return stream.read(1) == b"\x80"


def _unreadable(path: Path, reason: str) -> UserInputError:
    return UserInputError(
        f"{path} cannot be read as a torch checkpoint; it is truncated or corrupted: {reason}"
    )


def _state_of(content: Any, path: Path, depth: int = 0) -> dict[str, Tensor]:
    """The state dict of a torch file's content, wherever it keeps it; a dict may hold itself."""
    if isinstance(content, Mapping):
        if content and all(isinstance(value, Tensor) for value in content.values()):
            return dict(content)
        for key in _STATE_KEYS:
            inner = content.get(key)
            if isinstance(inner, Mapping) and inner and depth < _DEPTH:
                return _state_of(inner, path, depth + 1)
        found = ", ".join(str(key) for key in list(content)[:6])
        raise UserInputError(
            f"{path} is a dict without weights (keys: {found or 'none'}); wanted a state dict, or "
            f"one under {', '.join(_STATE_KEYS)}"
        )
    raise UserInputError(f"{path} holds a {type(content).__name__}, wanted a state dict")


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of one weight file.

    Raises:
        UserInputError: missing, truncated or corrupted.
    """
    if path.suffix != ".safetensors":
        return _state_of(read_torch(path), path)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state: dict[str, Tensor] = load_file(path)
        return state
    except FileNotFoundError:
        raise UserInputError(f"{path} does not exist") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise UserInputError(
            f"{path} cannot be read as safetensors; it is truncated or corrupted: {error}"
        ) from None


def fill(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Copy a state dict into a model, every weight of it.

    Checkpoints of a bare body (`layers.0...` for `model.layers.0...`) and of a model with a head
    for a bare body are both met in the wild: the model's base prefix is added or removed when that
    makes the names fit. A tied weight may be stored under any of its names.

    Raises:
        UserInputError: names the first mismatch and counts the rest.
    """
    state = _fit_names(model, state)
    wanted = model.state_dict()
    by_storage: dict[tuple[int, tuple[int, ...]], list[str]] = {}
    for name, value in wanted.items():
        by_storage.setdefault((value.data_ptr(), tuple(value.shape)), []).append(name)
    problems: list[str] = []
    for name, value in wanted.items():
        group = by_storage[(value.data_ptr(), tuple(value.shape))] if value.numel() else [name]
        source = next((alias for alias in (name, *group) if alias in state), None)
        if source is None:
            problems.append(f"{name} {list(value.shape)} is missing")
        elif state[source].shape != value.shape:
            problems.append(
                f"{name} has shape {list(state[source].shape)}, "
                f"the config wants {list(value.shape)}"
            )
        elif state[source].layout != torch.strided or state[source].is_meta:
            kind = "has no values (meta)" if state[source].is_meta else f"is {state[source].layout}"
            problems.append(f"{name} {kind}, wanted a dense tensor")
        elif not torch.is_floating_point(state[source]) and value.is_floating_point():
            problems.append(f"{name} is {state[source].dtype}, wanted floating point")
    unused = [name for name in state if name not in wanted and not _ignorable(model, name)]
    problems += [f"{name} {list(state[name].shape)} has no place in the model" for name in unused]
    if problems:
        more = f"; and {len(problems) - 1} more mismatches" if len(problems) > 1 else ""
        raise UserInputError(f"{where} does not fit its config: {problems[0]}{more}")
    with torch.no_grad():
        for (_, _), group in by_storage.items():
            source = next(alias for alias in group if alias in state)
            wanted[group[0]].copy_(state[source])


def _fit_names(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with wrappers' prefixes stripped, and the base prefix added or removed."""
    renamed = {
        name.removeprefix("module.").removeprefix("_orig_mod."): v for name, v in state.items()
    }
    wanted = model.state_dict().keys()
    prefix = getattr(model, "base_model_prefix", "")
    if not prefix:
        return renamed
    best = renamed
    added = {name if name in wanted else f"{prefix}.{name}": v for name, v in renamed.items()}
    removed = {name.removeprefix(f"{prefix}."): v for name, v in renamed.items()}
    for candidate in (added, removed):
        if len(wanted & candidate.keys()) > len(wanted & best.keys()):
            best = candidate
    return best


def _ignorable(model: nn.Module, name: str) -> bool:
    """Names that checkpoints carry and models do not need: masks, frequencies, training heads."""
    patterns = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or [])
    patterns += [r"\.attn\.(masked_)?bias$", r"rotary_emb\.inv_freq$", r"position_ids$"]
    import re

    if any(re.search(pattern, name) for pattern in patterns):
        return True
    # The head of a pre-training task, when the body alone is asked for.
    head: Any = getattr(model, "get_output_embeddings", lambda: None)
    bare = head() is None
    return bare and name.split(".")[0] in ("cls", "lm_head", "predictions", "classifier", "pooler")


__all__ = ["UnsupportedModelError", "fill", "load", "read_state", "read_torch"]
