"""Sizes that a module and its configuration spell out, after units left its weights."""

from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from elsa_compile import tracing
from elsa_compile.channels import Key, Ties, Units, members
from elsa_compile.passes.dead_units import readers
from elsa_compile.passes.removal import Kept, Undo, set_attribute
from elsa_compile.program import Program

_QUERIES = ("num_heads", "num_attention_heads", "n_head", "n_heads", "heads")
_GROUPS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
_WIDTHS = ("embed_dim", "split_size", "all_head_size", "hidden_size", "inner_dim", "q_size")
_INNER = ("intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size", "hidden_dim")
PER_LAYER = "elsa_intermediate_sizes"


def sync_module(found: Ties, groups: list[Units], kept: Kept, undo: Undo) -> None:
    """Bring the numbers that modules keep in line with their weights.

    Args:
        found: of the program before the removal.
        groups: whose units went.
        kept: what stays.
        undo: gets how to go back.
    """
    module = found.program.module
    if module is None:
        return
    changed = {id(found.tensors[name]) for name, _ in kept if name in found.tensors}
    for child in module.modules():
        own = [*child.parameters(recurse=False), *child.buffers(recurse=False)]
        if any(id(tensor) in changed for tensor in own):
            _sync_layer(child, undo)
    parents = dict(module.named_modules())
    for group in groups:
        sizes = _group_sizes(found, group, kept)
        names = [m.weight for m in members(found, group)]
        for parent in {name.rpartition(".")[0].rpartition(".")[0] for name in names}:
            for attribute, (old, new) in sizes.items():
                if parents[parent].__dict__.get(attribute) == old != new:
                    set_attribute(parents[parent], attribute, new, undo)


def _sync_layer(layer: Any, undo: Undo) -> None:
    """The layer's own sizes, read off its weight."""
    sizes: dict[str, int] = {}
    weight = layer.weight if isinstance(getattr(layer, "weight", None), Tensor) else None
    if isinstance(layer, nn.Linear):
        sizes = {"out_features": layer.weight.shape[0], "in_features": layer.weight.shape[1]}
    elif isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        out, inputs = layer.weight.shape[:2]
        groups = 1 if layer.groups == 1 else out * layer.groups // layer.out_channels
        sizes = {"groups": groups, "out_channels": out, "in_channels": inputs * groups}
    elif hasattr(layer, "num_features") and weight is not None:
        sizes = {"num_features": len(weight)}
    elif hasattr(layer, "nf") and weight is not None:  # Conv1D of transformers
        sizes = {"nx": weight.shape[0], "nf": weight.shape[1]}
    for name, value in sizes.items():
        if hasattr(layer, name):
            set_attribute(layer, name, int(value), undo)


def _group_sizes(found: Ties, group: Units, kept: Kept) -> dict[str, tuple[int, int]]:
    """Attribute -> (size before, size now) for a group of units."""

    def both(key: Key) -> tuple[int, int]:
        return found.sizes[key], len(kept.get(key, range(found.sizes[key])))

    width = both(readers(found, group)[0].read)
    if group.kind != "heads":
        return dict.fromkeys(_INNER, width)
    heads = next(key for key in group.labels if key in found.attention)
    entries = kept.get(heads, numpy.arange(found.sizes[heads]))
    left = len(set(group.labels[heads][entries].tolist()))
    return {
        **dict.fromkeys(_WIDTHS, width),
        **dict.fromkeys(_QUERIES, both(heads)),
        **dict.fromkeys(_GROUPS, (group.count, left)),
    }


def sync_config(found: Ties, groups: list[Units], kept: Kept, undo: Undo) -> None:
    """Write new head counts and inner sizes into the program's and the module's configuration.

    Head counts are equal in all layers. Where inner sizes differ, the field holds the largest and
    `elsa_intermediate_sizes` all of them.
    """
    program = found.program
    inner = [group for group in groups if group.kind == "neurons"]
    heads = [group for group in groups if group.kind == "heads"]
    values: dict[str, Any] = {}
    if heads:
        sizes = _group_sizes(found, heads[0], kept)
        values |= {name: sizes[name] for name in (*_QUERIES, *_GROUPS)}
    if inner:
        values |= _inner_sizes(found, inner, kept)
    config = program.config
    if config is not None:
        before = dict(config)

        def back() -> None:
            config.clear()
            config.update(before)

        undo.append(back)
        _update(config, values, bool(heads), program)
        if isinstance(config.get("text_config"), dict):
            config["text_config"] = dict(config["text_config"])
            _update(config["text_config"], values, bool(heads), program)
    own = getattr(program.module, "config", None)
    for name, pair in values.items():
        if isinstance(pair, tuple) and own is not None and getattr(own, name, None) == pair[0]:
            set_attribute(own, name, pair[1], undo)


def _inner_sizes(found: Ties, groups: list[Units], kept: Kept) -> dict[str, Any]:
    pairs = [_group_sizes(found, group, kept)[_INNER[0]] for group in groups]
    largest = (max(old for old, _ in pairs), max(new for _, new in pairs))
    values: dict[str, Any] = dict.fromkeys(_INNER, largest)
    if len({new for _, new in pairs}) > 1:
        values[PER_LAYER] = [new for _, new in pairs]
    return values


def _update(config: dict[str, Any], values: dict[str, Any], heads: bool, program: Program) -> None:
    config.pop(PER_LAYER, None)
    if heads and program.kind == "decoder" and "head_dim" not in config:
        config["head_dim"] = int(program.signature.args[3][0].shape[3])
    for name, pair in values.items():
        if not isinstance(pair, tuple):
            config[name] = pair
        elif config.get(name) == pair[0] or (name == "n_inner" and config.get(name, 0) is None):
            config[name] = pair[1]  # GPT-2's n_inner: null is four times the width


def module_runner(program: Program) -> Callable[..., Any] | None:
    """The original module, called like the traced graph; None when there is no module."""
    module = program.module
    if module is None:
        return None
    if program.kind == "decoder":
        return tracing.CachedDecoder(module)
    if program.kind == "encoder":
        names = program.signature
        return tracing.NamedOutputs(module, names.input_names, names.output_names)
    return module


@torch.no_grad()
def module_outputs(program: Program, args: tuple[Any, ...]) -> Any:
    """What the module gives for inputs laid out like `signature.args`; None without a module."""
    run = module_runner(program)
    return None if run is None else run(*args)
