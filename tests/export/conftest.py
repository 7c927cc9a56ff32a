"""Exported decoders, and a reader of ONNX files that shares nothing with the writer."""

import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

os.environ.setdefault("HF_HUB_OFFLINE", "1")

LAYERS = 2
HEADS = 4
HEAD_DIM = 16
SPARSITY = 0.8

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Decoder:
    """A random tiny decoder with pruned weights.

    model: as exported, layout operations of weights unfolded; folded: with torch.onnx's default
    optimiser, which renames small weights; weights: the torch parameters by name in the graph;
    pruned: names of those with 80 % zeros; reference: the untouched export, saved by onnx_ir.
    """

    model: ir.Model
    folded: ir.Model
    weights: Arrays
    pruned: tuple[str, ...]
    reference: Path


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            max_position_embeddings=128,
        )
    )


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=128, n_embd=64, n_layer=LAYERS, n_head=HEADS, n_positions=128)
    )


def _prune(model: Any, seed: int) -> list[str]:
    """Multiply by a mask, as pruning does: the zeros keep the signs of the weights."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    names = []
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and (".layers." in name or ".h." in name):
                kept = torch.rand(parameter.shape, generator=generator) >= SPARSITY
                parameter.mul_(kept)
                names.append(f"model.{name}")
    return names


def _export(model: Any) -> tuple[ir.Model, ir.Model]:
    import onnxscript.optimizer
    import torch
    from onnxscript.rewriter import onnx_fusions
    from transformers import DynamicCache

    class Wrapper(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, past: Any) -> Any:
            cache = DynamicCache()
            for layer in range(LAYERS):
                cache.update(past[2 * layer], past[2 * layer + 1], layer)
            out = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
            )
            present = []
            for layer in out.past_key_values.layers:
                present += [layer.keys, layer.values]
            return out.logits, present

    feed = feeds(2, 3, 5)
    past = [torch.from_numpy(feed[name]) for name in feed if name.startswith("past")]
    args = (*(torch.from_numpy(a) for n, a in feed.items() if not n.startswith("past")), past)
    auto = torch.export.Dim.AUTO
    token_axes = {0: auto, 1: auto}
    program = torch.onnx.export(
        Wrapper(),
        args,
        None,
        dynamo=True,
        opset_version=23,
        input_names=list(feed),
        output_names=["logits", *(n.replace("past_key_values", "present") for n in list(feed)[3:])],
        dynamic_shapes=(token_axes, token_axes, token_axes, [{0: auto, 2: auto}] * len(past)),
        optimize=False,
        verbose=False,
    )
    assert program is not None
    folded = program.model.clone()
    onnxscript.optimizer.optimize_ir(folded)
    onnx_fusions.fuse(folded)
    onnxscript.optimizer.optimize_ir(program.model, should_fold=_keep_weights)
    onnx_fusions.fuse(program.model)
    return program.model, folded


def _keep_weights(node: ir.Node) -> bool | None:
    value = node.inputs[0] if node.inputs else None
    keep = node.op_type == "Transpose" and value is not None and value.is_initializer()
    return False if keep else None


def feeds(batch: int, length: int, past: int, seed: int = 0) -> Arrays:
    """Inputs of a decoder."""
    rng = np.random.default_rng(seed)
    feed: Arrays = {
        "input_ids": rng.integers(0, 128, (batch, length)),
        "attention_mask": np.ones((batch, length + past), np.int64),
        "position_ids": np.tile(np.arange(past, past + length), (batch, 1)),
    }
    for layer in range(LAYERS):
        for kind in ("key", "value"):
            shape = (batch, HEADS, past, HEAD_DIM)
            feed[f"past_key_values.{layer}.{kind}"] = rng.standard_normal(shape, np.float32)
    return feed


@pytest.fixture(scope="session")
def decoder_feeds() -> Callable[..., Arrays]:
    """feeds(batch, length, past)."""
    return feeds


@pytest.fixture(scope="session", params=["llama", "gpt2"])
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """llama: nothing tied, MatMul behind Transpose; gpt2: a tied embedding, Gemm, no Transpose."""
    import torch

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = {"llama": _llama, "gpt2": _gpt2}[request.param]().eval()
        pruned = _prune(model, seed=1)
        exported, folded = _export(model)
    logging.disable(before)
    reference = tmp_path_factory.mktemp(request.param) / "reference.onnx"
    ir.save(exported, reference)
    weights = {
        f"model.{name}": parameter.detach().numpy()
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    return Decoder(exported, folded, weights, tuple(pruned), reference)


def _decode_coo(sparse: Any, folder: Path) -> NDArray[Any]:
    values = onnx.numpy_helper.to_array(sparse.values, str(folder))
    indices = onnx.numpy_helper.to_array(sparse.indices, str(folder))
    assert indices.shape == values.shape
    assert np.all(np.diff(indices) > 0), "sorted and unique"
    assert np.all(values != 0), "no zero is stored"
    size = int(np.prod(sparse.dims))
    assert indices.size == 0 or 0 <= indices[0] <= indices[-1] < size
    dense = np.zeros(size, values.dtype)
    dense[indices] = values
    return dense.reshape(tuple(sparse.dims))


@pytest.fixture(scope="session")
def decode() -> Callable[[Path], Arrays]:
    """Every initializer of a file as a dense array, read with the onnx package alone."""

    def run(path: Path) -> Arrays:
        model = onnx.load(path, load_external_data=False)
        arrays = {
            t.name: onnx.numpy_helper.to_array(t, str(path.parent)) for t in model.graph.initializer
        }
        for sparse in model.graph.sparse_initializer:
            assert sparse.values.name not in arrays
            arrays[sparse.values.name] = _decode_coo(sparse, path.parent)
        return arrays

    return run


@pytest.fixture(scope="session")
def run_onnx() -> Callable[[Path, Arrays], list[NDArray[Any]]]:
    """Run a file in onnxruntime on the CPU, with one thread."""

    def run(path: Path, feed: Arrays) -> list[NDArray[Any]]:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
        outputs: list[NDArray[Any]] = session.run(None, feed)
        return outputs

    return run
