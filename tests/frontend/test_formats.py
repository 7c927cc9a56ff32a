"""Every way in which a model may lie on disk gives the same program."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import elsa_compile
from elsa_compile import data, frontend
from elsa_compile.errors import UserInputError


@pytest.fixture(scope="module")
def llama(make_family):
    return make_family("llama")


@pytest.fixture(scope="module")
def wanted(llama):
    """Logits of the module itself."""
    with torch.no_grad():
        return llama(input_ids=torch.arange(6)[None]).logits


def check(program, wanted):
    found = data.logits(program, torch.arange(6)[None])
    assert torch.allclose(found, wanted, atol=1e-5)
    assert len(program.prunable) == 15


def config_beside(folder, llama):
    (folder / "config.json").write_text(json.dumps(llama.config.to_dict(), default=str))


def test_a_folder(llama_folder, wanted):
    program = frontend.load(llama_folder)
    check(program, wanted)
    assert program.folder == llama_folder
    assert program.config["model_type"] == "llama"


def test_a_folder_of_shards(llama, wanted, tmp_path):
    llama.save_pretrained(tmp_path, max_shard_size="60KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    check(frontend.load(tmp_path), wanted)


def test_a_missing_shard_is_named(llama, tmp_path):
    llama.save_pretrained(tmp_path, max_shard_size="60KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserInputError, match=shard.name):
        frontend.load(tmp_path)


@pytest.mark.parametrize("name", ["model.pt", "model.pth"])
def test_a_state_dict_with_its_config_beside_it(name, llama, wanted, tmp_path):
    torch.save(llama.state_dict(), tmp_path / name)
    config_beside(tmp_path, llama)
    check(frontend.load(tmp_path / name), wanted)


def test_safetensors_with_a_config_elsewhere(llama, wanted, tmp_path):
    state = {name: value.contiguous() for name, value in llama.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    elsewhere = tmp_path / "config"
    elsewhere.mkdir()
    config_beside(elsewhere, llama)
    check(frontend.load(tmp_path / "w.safetensors", config=elsewhere), wanted)


def test_a_config_of_another_name(llama, wanted, tmp_path):
    torch.save(llama.state_dict(), tmp_path / "model.pt")
    (tmp_path / "config.json").write_text('{"model_type": "perceptron9000"}')
    config = json.dumps(llama.config.to_dict(), default=str)
    (tmp_path / "right.json").write_text(config)
    check(frontend.load(tmp_path / "model.pt", config=tmp_path / "right.json"), wanted)


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_a_dict_that_holds_both(key, llama, wanted, tmp_path):
    content = {key: llama.state_dict(), "config": llama.config.to_dict(), "epoch": 3}
    content["config"] = json.loads(json.dumps(content["config"], default=str))
    torch.save(content, tmp_path / "checkpoint.pt")
    check(frontend.load(tmp_path / "checkpoint.pt"), wanted)


def test_prefixes_of_training_wrappers_are_dropped(llama, wanted, tmp_path):
    state = {f"module._orig_mod.{name}": value for name, value in llama.state_dict().items()}
    torch.save(state, tmp_path / "model.pt")
    config_beside(tmp_path, llama)
    check(frontend.load(tmp_path / "model.pt"), wanted)


def test_a_pickled_module_opens_only_when_allowed(llama, wanted, tmp_path):
    path = tmp_path / "model.pt"
    torch.save(llama, path)
    with pytest.raises(UserInputError, match="runs code from the file.*--allow-pickle"):
        frontend.load(path)
    check(frontend.load(path, allow_pickle=True), wanted)


class _Bomb:
    def __reduce__(self):
        return (print, ("code of the file ran",))


def test_no_code_of_a_pickle_runs_without_permission(tmp_path, capsys):
    torch.save({"state_dict": _Bomb()}, tmp_path / "model.pt")
    with pytest.raises(UserInputError, match="--allow-pickle"):
        frontend.load(tmp_path / "model.pt")
    assert capsys.readouterr().out == ""


def test_torchscript_is_recognised_and_refused_with_advice(mlp, tmp_path):
    path = tmp_path / "model.pt"
    torch.jit.trace(mlp, torch.randn(2, 16)).save(str(path))
    with pytest.raises(UserInputError, match=r"TorchScript archive.*torch\.export\.save"):
        frontend.load(path)


def test_an_exported_language_model(llama, wanted, tmp_path, tokenizer_folder):
    class Plain(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, input_ids):
            return self.model(input_ids=input_ids, use_cache=False).logits

    dims = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    exported = torch.export.export(
        Plain(llama), (torch.zeros(2, 7, dtype=torch.long),), dynamic_shapes=(dims,), strict=False
    )
    torch.export.save(exported, tmp_path / "lm.pt2")
    program = frontend.load(tmp_path / "lm.pt2", tokenizer=tokenizer_folder)
    assert data.is_language_model(program)
    check(program, wanted)
    # Its positions are counted inside, for one row: every row of a batch needs them in the file.
    result = elsa_compile.compile(tmp_path / "lm.pt2", tmp_path / "out" / "lm.onnx")
    logits = next(c for c in result.report.verification["checks"] if c["name"] == "logits")
    assert logits["ok"]
    assert "batch 3" in logits["detail"]
    assert "= 6" in logits["detail"]  # and of another length than its 7 tokens


def test_weights_that_nothing_reads_are_left_out(tmp_path):
    """The pooler of an encoder whose hidden states are the output."""
    from transformers import BertConfig, BertModel

    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1,
                                num_attention_heads=2, intermediate_size=32)  # fmt: skip
            self.bert = BertModel(config).eval()

        def forward(self, ids):
            return self.bert(input_ids=ids).last_hidden_state

    exported = torch.export.export(Hidden(), (torch.ones(2, 8, dtype=torch.long),), strict=False)
    torch.export.save(exported, tmp_path / "encoder.pt2")
    result = elsa_compile.compile(tmp_path / "encoder.pt2", tmp_path / "out" / "encoder.onnx")
    assert result.report.verification["ok"]
    names = [row["name"] for row in result.report.weights]
    assert any("attention" in name for name in names)
    assert not any("pooler" in name for name in names)


def test_a_module_needs_example_inputs(mlp):
    with pytest.raises(UserInputError, match="example_inputs"):
        frontend.load(mlp)
    program = frontend.load(mlp, (torch.randn(3, 16),))
    assert program.kind == "generic"


def test_gguf(llama, wanted, tmp_path, tokenizer_folder):
    pytest.importorskip("gguf")
    path = tmp_path / "model.gguf"
    write_gguf(path, llama, tokenizer_folder)
    program = frontend.load(path)
    check(program, wanted)
    from elsa_compile.runtime.text import Tokenizer

    ours, converted = Tokenizer(tokenizer_folder), Tokenizer(program.folder)
    sentence = "The old king saw a small town."
    assert converted.decode(converted.encode(sentence)) == sentence
    assert list(converted.encode(sentence)) == list(ours.encode(sentence))


def write_gguf(path, llama, tokenizer_folder):
    """A float32 GGUF of a LLaMA; query and key rows in the order llama.cpp keeps them."""
    import gguf

    config = llama.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    content = json.loads((tokenizer_folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)
    merges = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3, 3, 3] + [1] * (len(vocabulary) - 3))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    for name, value in llama.state_dict().items():
        if name.startswith("model.layers."):
            _, _, number, *rest = name.split(".")
            inner = ".".join(rest).removesuffix(".weight")
            if inner.endswith(("q_proj", "k_proj")):
                heads = value.shape[0] // config.head_dim
                halves = value.reshape(heads, 2, config.head_dim // 2, value.shape[1])
                value = halves.swapaxes(1, 2).reshape(value.shape)
            target = f"blk.{number}.{names[inner]}.weight"
        else:
            target = {
                "model.embed_tokens.weight": "token_embd.weight",
                "model.norm.weight": "output_norm.weight",
                "lm_head.weight": "output.weight",
            }[name]
        writer.add_tensor(target, value.float().numpy().copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
