"""genai_config.json: what onnxruntime-genai needs to run a compiled decoder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elsa_compile.program import Program
from elsa_compile.runtime.text import Tokenizer, max_length

# genai decides by `type` how it feeds a model; these share the plain decoder loop. Its "gpt2" is
# for graphs with one combined cache tensor a layer.
_KNOWN = {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi", "phi3"}
_RENAMED = {"gemma3_text": "gemma3_text", "smollm3": "smollm3"}
_GREEDY = {
    "do_sample": False,
    "early_stopping": True,
    "min_length": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    # Buffers are allocated per token otherwise; the graph's cache grows by concatenation.
    "past_present_share_buffer": False,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_k": 1,
    "top_p": 1.0,
}


def genai_config(program: Program, filename: str) -> dict[str, Any]:
    """The configuration for a decoder's ONNX file.

    Args:
        program: a decoder with its config; with a tokenizer folder the special tokens come from it.
        filename: of the .onnx file, in the same folder.
    """
    config = dict(program.config or {})
    config |= {key: value for key, value in (config.get("text_config") or {}).items()}
    example = program.signature.args[3][0]
    layers = len(program.signature.args[3]) // 2
    heads, head_dim = example.shape[1], example.shape[3]
    length = max_length(config) or 2048
    kind = str(config.get("model_type", "llama"))
    queries = config.get("num_attention_heads") or config.get("n_head") or heads
    hidden = config.get("hidden_size") or config.get("n_embd") or queries * head_dim
    names = {
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    }
    presents = {"present_key_names": "present.%d.key", "present_value_names": "present.%d.value"}
    inputs = {n: n for n in ("input_ids", "attention_mask", "position_ids")}
    return {
        "model": {
            **_special_tokens(program, config),
            "context_length": length,
            "decoder": {
                "session_options": {"log_id": "elsa-compile", "provider_options": []},
                "filename": filename,
                "head_size": head_dim,
                "hidden_size": hidden,
                "inputs": inputs | names,
                "outputs": {"logits": "logits"} | presents,
                "num_attention_heads": queries,
                "num_hidden_layers": layers,
                "num_key_value_heads": heads,
            },
            # The graph names its own inputs: any plain-decoder type runs it.
            "type": kind if kind in _KNOWN else _RENAMED.get(kind, "llama"),
            "vocab_size": vocabulary(program),
        },
        "search": {**_GREEDY, "max_length": length},
    }


def _special_tokens(program: Program, config: Mapping[str, Any]) -> dict[str, Any]:
    """Ids of BOS, EOS and padding, by the config, else by the tokenizer, else those of EOS."""
    bos, eos = _first(config.get("bos_token_id")), _list(config.get("eos_token_id"))
    if program.folder is not None and (program.folder / "tokenizer.json").is_file():
        tokenizer = Tokenizer(program.folder)
        bos = tokenizer.bos_id if bos is None else bos
        eos = eos or sorted(tokenizer.eos_ids)
    eos = eos or [0]
    pad = _first(config.get("pad_token_id"))
    return {
        "bos_token_id": eos[0] if bos is None else bos,
        "eos_token_id": eos if len(eos) > 1 else eos[0],
        "pad_token_id": eos[0] if pad is None else pad,
    }


def vocabulary(program: Program) -> int:
    """Width of the logits."""
    config = program.config or {}
    size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    if size:
        return int(size)
    head = [weight for weight in program.weights.values() if weight.is_head]
    return int(head[0].matrix_shape[0])


def copy_companions(folder: Path, out: Path) -> list[Path]:
    """Copy tokenizer and generation settings beside the model; returns the new files."""
    import shutil

    names = [
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json"),
        *("merges.txt", "tokenizer.model", "generation_config.json", "chat_template.jinja"),
        *("added_tokens.json",),
    ]
    copied = []
    for name in names:
        source = folder / name
        if source.is_file() and source.resolve() != (out / name).resolve():
            shutil.copyfile(source, out / name)
            copied.append(out / name)
    return copied


def _first(value: Any) -> int | None:
    values = _list(value)
    return values[0] if values else None


def _list(value: Any) -> list[int]:
    found = value if isinstance(value, list) else [value]
    return [int(i) for i in found if isinstance(i, int) and i >= 0]
