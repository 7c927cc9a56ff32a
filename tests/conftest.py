"""Small random models of every kind that is compiled, a tokenizer, and text.

Everything here is made in seconds and without network.
"""

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from torch import nn

from elsa_compile import pipeline

torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]
VOCABULARY = 300
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_GATED = {**_COMMON, "intermediate_size": 64, "num_key_value_heads": 2}
_SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
# name: (model_type, what differs from a LLaMA with two layers of width 32)
FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", _GATED),
    "llama-tied": ("llama", {**_GATED, "tie_word_embeddings": True}),
    "mistral": ("mistral", {**_GATED, "sliding_window": 32}),
    "qwen2": ("qwen2", _GATED),
    "qwen3": ("qwen3", {**_GATED, "head_dim": 8}),
    "gemma3": ("gemma3_text", {**_GATED, "head_dim": 8, "sliding_window": 32}),
    "phi3": ("phi3", _GATED),
    "gpt2": ("gpt2", {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4,
                      "n_positions": 128}),
    "opt": ("opt", {**_COMMON, "ffn_dim": 64, "word_embed_proj_dim": 32}),
    "neox": ("gpt_neox", {**_COMMON, "intermediate_size": 64}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _facts_are_checked_after_every_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "VERIFY_DEFAULT", "each")


@pytest.fixture(scope="session")
def make_family() -> Callable[[str], nn.Module]:
    """Name of a decoder family -> a random model of it, equal at each call."""

    def make(name: str) -> nn.Module:
        from transformers import AutoConfig, AutoModelForCausalLM

        kind, options = FAMILIES[name]
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **{**_SPECIAL, **options})
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:  # of a size at which wrong arithmetic shows in the logits
                    parameter.mul_(4.0)
        return model

    return make


@pytest.fixture(scope="session")
def make_bert() -> Callable[[], nn.Module]:
    """A random BERT encoder."""

    def make() -> nn.Module:
        from transformers import BertConfig, BertModel

        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=64, max_position_embeddings=64,
        )  # fmt: skip
        return BertModel(config, add_pooling_layer=False).eval()

    return make


class Cnn(nn.Module):
    """Two convolutions, one of them depthwise, with BatchNorm; 10 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 16, 1)
        self.head = nn.Linear(16, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.stem(image)))
        x = torch.relu(self.point(self.depthwise(x)))
        return self.head(x.mean(dim=(2, 3)))


@pytest.fixture
def cnn() -> nn.Module:
    """A CNN whose BatchNorm has seen data."""
    torch.manual_seed(0)
    model = Cnn()
    for _ in range(3):
        model(torch.randn(4, 3, 16, 16))
    return model.eval()


@pytest.fixture
def mlp() -> nn.Module:
    """16 -> 32 -> 32 -> 4."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
    ).eval()


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 4,000 tokens of made-up prose with regularities."""
    numbers = random.Random(0)
    names = ("the river", "a small town", "the old king", "every ship", "our captain")
    verbs = ("crossed", "saw", "remembered", "left", "found")
    lines = [
        f"{numbers.choice(names).capitalize()} {numbers.choice(verbs)} {numbers.choice(names)}."
        for _ in range(400)
    ]
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A byte-level BPE of exactly the models' vocabulary."""
    import json

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text_file.read_text(encoding="utf-8").splitlines(), trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def llama_folder(
    tmp_path_factory: pytest.TempPathFactory,
    make_family: Callable[[str], nn.Module],
    tokenizer_folder: Path,
) -> Path:
    """A Hugging Face folder: random LLaMA, tokenizer."""
    import shutil

    folder = tmp_path_factory.mktemp("models") / "llama"
    make_family("llama").save_pretrained(folder)
    for file in tokenizer_folder.iterdir():
        shutil.copy(file, folder)
    return folder
