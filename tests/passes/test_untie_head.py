"""untie-head: two weights where there was one, in every view, for those who treat them apart."""

import onnx
import onnxruntime
import pytest
import torch
from torch.utils import _pytree as pytree

from elsa_compile import apply, export, frontend, verify_export
from elsa_compile.passes import AllocateUniform, FoldNormScale, PruneMagnitude, UntieHead


def outputs(program):
    return pytree.tree_leaves(program.run(*program.signature.args))[0]


@pytest.mark.parametrize(
    ("name", "table"),
    [("llama-tied", "model.embed_tokens.weight"), ("gpt2", "transformer.wte.weight"),
     ("opt", "model.decoder.embed_tokens.weight"), ("gemma3", "model.embed_tokens.weight")],
)  # fmt: skip
def test_the_head_is_a_weight_of_its_own(name, table, make_family, tmp_path):
    program = frontend.from_module(make_family(name))
    wanted, before = outputs(program), program.parameters()
    apply(program, UntieHead())
    assert program.history[-1].stats.changed == 1
    assert torch.equal(outputs(program), wanted)
    assert program.parameters() == before + 300 * 32
    head, embedding = program.weights["lm_head.weight"], program.weights[table]
    assert head.prunable
    assert head.is_head
    assert (embedding.kind, embedding.is_head, embedding.aliases) == ("embedding", False, ())
    assert program.module.lm_head.weight is head.parameter
    assert program.module.get_input_embeddings().weight is embedding.parameter
    assert program.config["tie_word_embeddings"] is False
    # Pruning the head leaves the embedding alone, in the file too.
    values = embedding.parameter.detach().clone()
    apply(program, AllocateUniform(sparsity=0.9, targets=["lm_head.weight"]), PruneMagnitude())
    assert torch.equal(embedding.parameter, values)
    written = export.export(program, tmp_path / "model.onnx")
    assert {"lm_head.weight", table} <= {record.name for record in written.records}
    session = onnxruntime.InferenceSession(
        str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    check = verify_export.check_logits(program, session)
    assert check.ok, check.detail
    sparse = {
        s.values.name: s for s in onnx.load(str(tmp_path / "model.onnx")).graph.sparse_initializer
    }
    assert sparse["lm_head.weight"].values.dims[0] == 960
    with torch.no_grad():
        ids = torch.arange(8)[None]
        logits = program.module(input_ids=ids, use_cache=False).logits
    from elsa_compile.data import run_row

    assert torch.allclose(run_row(program, {"input_ids": ids})[0], logits, atol=1e-4)


def test_twice_is_once_and_plans_know_the_head(make_family):
    program = frontend.from_module(make_family("llama-tied"))
    apply(program, AllocateUniform(sparsity=0.5), PruneMagnitude(), UntieHead())
    assert program.plans["lm_head.weight"].skipped is not None
    text = program.to_text()
    apply(program, UntieHead())
    assert program.history[-1].stats.changed == 0
    assert program.history[-1].stats.notes == ["no head is tied to an embedding"]
    assert program.to_text() == text


def test_the_last_norm_folds_once_the_head_is_apart(make_family):
    model = make_family("llama-tied")
    torch.nn.init.uniform_(model.model.norm.weight, 0.5, 2.0)
    program = frontend.from_module(model)
    wanted = outputs(program)
    apply(program, FoldNormScale())
    assert not model.model.norm.weight.eq(1).all()
    apply(program, UntieHead(), FoldNormScale())
    assert model.model.norm.weight.eq(1).all()
    assert torch.allclose(outputs(program), wanted, atol=1e-5 * float(wanted.abs().max()))
