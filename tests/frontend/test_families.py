"""Every kind of model: traced, pruned, exported, run in onnxruntime, equal to torch."""

import numpy as np
import onnxruntime
import pytest
import torch

import elsa_compile
from elsa_compile import apply, export, frontend, verify_export
from elsa_compile.passes import AllocateUniform, FoldConstants, PruneMagnitude

DECODERS = ("llama-tied", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "gpt2", "opt", "neox")


def emit(program, tmp_path):
    """Prune at 60 %, export, open; returns the session."""
    apply(program, AllocateUniform(sparsity=0.6), PruneMagnitude(), FoldConstants())
    path = tmp_path / "model.onnx"
    written = export.export(program, path)
    pruned = {weight.name for weight, _ in program.planned()}
    coo = {record.name for record in written.records if record.form == "coo"}
    assert pruned, "nothing was pruned"
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session, pruned, coo


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_computes_the_same_in_onnxruntime(name, make_family, tmp_path):
    program = frontend.from_module(make_family(name))
    assert program.kind == "decoder"
    session, pruned, coo = emit(program, tmp_path)
    assert pruned <= coo
    check = verify_export.check_logits(program, session)
    assert check.ok, check.detail
    assert check.difference < 2e-5
    shapes = {value.name: value.shape for value in session.get_inputs()}
    assert shapes["input_ids"] == ["batch", "sequence"]
    assert shapes["attention_mask"] == ["batch", "total"]
    assert shapes["past_key_values.0.key"][0::2] == ["batch", "past"]


def test_the_exported_graph_agrees_with_the_module_itself(make_family, tmp_path):
    model = make_family("llama")
    program = frontend.from_module(model)
    session, _, _ = emit(program, tmp_path)
    ids = torch.randint(0, 300, (2, 9))
    with torch.no_grad():
        wanted = model(input_ids=ids).logits.numpy()
    feeds = {
        "input_ids": ids.numpy(),
        "attention_mask": np.ones((2, 9), dtype=np.int64),
        "position_ids": np.tile(np.arange(9), (2, 1)),
    }
    for value in session.get_inputs():
        if value.name.startswith("past"):
            feeds[value.name] = np.zeros((2, value.shape[1], 0, value.shape[3]), dtype=np.float32)
    found = session.run(["logits"], feeds)[0]
    assert np.abs(found - wanted).max() < 1e-4 * max(1.0, np.abs(wanted).max())


def test_conv1d_weights_of_gpt2_are_prunable_and_transposed(make_family):
    program = frontend.from_module(make_family("gpt2"))
    weight = program.prunable["transformer.h.0.mlp.c_fc.weight"]
    assert weight.transposed
    assert weight.matrix_shape == (128, 32)


@pytest.mark.parametrize("name", ["llama-tied", "gemma3", "gpt2"])
def test_a_tied_embedding_is_one_weight(name, make_family):
    program = frontend.from_module(make_family(name))
    embeddings = [w for w in program.weights.values() if 300 in w.parameter.shape]
    assert len(embeddings) == 1
    assert embeddings[0].is_head
    assert not embeddings[0].prunable


def test_an_encoder_computes_the_same_in_onnxruntime(make_bert, tmp_path):
    program = frontend.from_module(make_bert())
    assert program.kind == "encoder"
    session, pruned, coo = emit(program, tmp_path)
    assert pruned <= coo
    check = verify_export.check_logits(program, session)
    assert check.ok, check.detail
    assert [i.name for i in session.get_inputs()][:2] == ["input_ids", "attention_mask"]


def test_a_cnn_computes_the_same_in_onnxruntime(cnn, tmp_path):
    program = frontend.from_module(cnn, (torch.randn(2, 3, 16, 16),))
    session, pruned, _ = emit(program, tmp_path)
    assert {"stem.weight", "depthwise.weight", "point.weight", "head.weight"} <= pruned
    check = verify_export.check_logits(program, session)
    assert check.ok, check.detail
    assert "batch 3" in check.detail


def test_an_exported_mlp_computes_the_same_in_onnxruntime(mlp, tmp_path):
    batch = torch.export.Dim("rows")
    exported = torch.export.export(mlp, (torch.randn(2, 16),), dynamic_shapes=({0: batch},))
    torch.export.save(exported, tmp_path / "mlp.pt2")
    program = frontend.load(tmp_path / "mlp.pt2")
    assert set(program.prunable) == {"0.weight", "2.weight", "4.weight"}
    session, _, _ = emit(program, tmp_path)
    check = verify_export.check_logits(program, session)
    assert check.ok, check.detail


def test_half_precision_models_are_computed_in_float32(mlp, caplog):
    program = frontend.from_module(mlp.half(), (torch.randn(2, 16),))
    assert {w.parameter.dtype for w in program.weights.values()} == {torch.float32}


class Branches(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(4, 4)

    def forward(self, x):
        y = self.inner(x)
        return y if float(y.sum()) > 0 else -y


def test_what_cannot_be_traced_is_named():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), Branches())
    with pytest.raises(frontend.UnsupportedModelError) as caught:
        frontend.from_module(model, (torch.randn(2, 4),))
    assert "module 1" in str(caught.value)
    assert "float(y.sum()) > 0" in str(caught.value)


def test_an_encoder_with_one_token_type(tmp_path):
    """RoBERTa: a made-up token type of 1 is outside of its table."""
    from transformers import RobertaConfig, RobertaModel

    config = RobertaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=40, type_vocab_size=1,
    )  # fmt: skip
    result = elsa_compile.compile(RobertaModel(config).eval(), tmp_path / "model.onnx")
    assert result.report.verification["ok"]
