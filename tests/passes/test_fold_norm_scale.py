"""fold-norm-scale: the same function, scales of one, zeros where they were."""

import pytest
import torch
from torch.utils import _pytree as pytree

from elsa_compile import apply, facts, frontend
from elsa_compile.passes import AllocateUniform, FoldNormScale, PruneMagnitude
from elsa_compile.passes.fold_norm_scale import fold_scale


def shaken(model, seed=0):
    """Scales and shifts that are not one and zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name.lower() or "ln_" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


def outputs(program):
    return pytree.tree_leaves(program.run(*program.signature.args))[0]


def test_zero_stays_zero_under_a_negative_scale():
    folded = fold_scale(torch.tensor([[0.0, 2.0]]), torch.tensor([-1.0, -3.0]))
    assert folded.tolist() == [[0.0, -6.0]]
    assert not torch.signbit(folded[0, 0])


# How many of the norms are folded, how many are not; two layers each.
@pytest.mark.parametrize(
    ("name", "folded", "refused"),
    [("llama", 5, 0), ("qwen3", 5, 4), ("gemma3", 4, 9), ("gpt2", 4, 1), ("opt", 4, 1)],
)
def test_the_function_stays_and_zeros_stay(name, folded, refused, make_family):
    program = frontend.from_module(shaken(make_family(name)))
    apply(program, AllocateUniform(sparsity=0.5), PruneMagnitude())
    wanted = outputs(program)
    zeros = {n: w.parameter == 0 for n, w in program.prunable.items()}
    apply(program, FoldNormScale())
    counts = program.history[-1].stats.counts
    assert counts == {"folded": folded, "refused": refused}
    assert torch.allclose(outputs(program), wanted, atol=2e-5 * float(wanted.abs().max()))
    for weight_name, zero in zeros.items():
        assert not program.weights[weight_name].parameter[zero].any()
    for fact in program.facts:
        facts.check(program, fact)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        assert torch.isfinite(program.module(input_ids=ids).logits).all()
    apply(program, FoldNormScale())
    assert program.history[-1].stats.changed == 0


def test_the_weights_are_scaled_by_hand(make_family):
    model = shaken(make_family("llama"))
    layer = model.model.layers[0]
    scale = layer.post_attention_layernorm.weight.detach().clone()
    gate, down = (m.weight.detach().clone() for m in (layer.mlp.gate_proj, layer.mlp.down_proj))
    apply(model, FoldNormScale())
    assert torch.allclose(layer.mlp.gate_proj.weight, gate * scale)
    assert torch.equal(layer.mlp.down_proj.weight, down)
    assert layer.post_attention_layernorm.weight.eq(1).all()


def test_a_shift_moves_into_the_bias(make_family):
    model = shaken(make_family("gpt2"))
    block = model.transformer.h[0]
    shift, weight = block.ln_2.bias.detach().clone(), block.mlp.c_fc.weight.detach().clone()
    bias = block.mlp.c_fc.bias.detach().clone()
    apply(model, FoldNormScale())
    assert torch.allclose(block.mlp.c_fc.bias, bias + shift @ weight, atol=1e-5)
    assert not block.ln_2.bias.any()
    # The last norm feeds the head, which is the embedding as well.
    assert not model.transformer.ln_f.weight.eq(1).all()


def test_a_norm_that_the_residual_stream_reads_stays(make_bert):
    program = frontend.from_module(shaken(make_bert()))
    apply(program, FoldNormScale())
    stats = program.history[-1].stats
    assert stats.changed == 0
    assert "their values also go to add" in " ".join(stats.notes)
