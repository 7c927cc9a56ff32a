"""onnxruntime-genai opens what the compiler writes and gives equal tokens."""

import pytest

import elsa_compile

og = pytest.importorskip("onnxruntime_genai", reason="pip install elsa-compile[genai]")

PROMPT = [5, 17, 40, 9, 260, 33]
NEW = 12


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3", "gpt2"])
def test_genai_gives_the_tokens_of_our_runtime(family, make_family, tokenizer_folder, tmp_path):
    import numpy as np

    from elsa_compile.runtime.decoder import open_decoder
    from elsa_compile.runtime.generate import tokens

    elsa_compile.compile(
        make_family(family), tmp_path / "model.onnx", "magnitude", sparsity=0.5,
        tokenizer=tokenizer_folder,
    )  # fmt: skip
    decoder, _ = open_decoder(tmp_path, provider="cpu")
    stream = tokens(decoder, np.array(PROMPT))
    wanted = [next(stream) for _ in range(NEW)]

    model = og.Model(str(tmp_path))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=len(PROMPT) + NEW, do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens([PROMPT])
    found = []
    while len(found) < NEW and not generator.is_done():
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    assert len(found) >= 3
    # genai stops at the end token, our stream does not.
    assert found == wanted[: len(found)]
