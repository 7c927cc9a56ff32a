# elsa-compile. `make quickstart` and `make test` are all a newcomer needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
SPARSITY ?= 0.5
PRESET ?= sparsegpt
TINY := examples/tiny-llama
export PYTHONUNBUFFERED := 1

help: ## this list
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(BIN)/.installed: pyproject.toml runtime/native/CMakeLists.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e '.[dev,genai]'
	@touch $@

venv: $(BIN)/.installed ## make .venv and install the project into it

quickstart: venv ## compile the tiny LLaMA to 80 % zeros, verify it in onnxruntime, let it write
	$(BIN)/elsa-compile $(TINY) -o build/tiny/model.onnx --preset elsa --sparsity 0.8 \
	    --data $(TINY)/train.txt --eval-data $(TINY)/valid.txt --window 256
	$(BIN)/elsa-run verify build/tiny/model.onnx
	$(BIN)/elsa-run eval build/tiny/model.onnx --data $(TINY)/valid.txt --window 256 --max-windows 64
	$(BIN)/elsa-run generate build/tiny/model.onnx --prompt "The city of" --max-new-tokens 60

test: venv ## run the whole test suite
	$(BIN)/pytest -n $(JOBS) --dist worksteal

slow: venv ## run the tests that take minutes or gigabytes
	$(BIN)/pytest -m slow

lint: venv ## ruff and mypy
	$(BIN)/ruff check elsa_compile passes runtime tests tools
	$(BIN)/ruff format --check elsa_compile passes runtime tests tools
	$(BIN)/mypy elsa_compile tools

models/smollm2-135m/config.json: | venv
	$(BIN)/python tools/fetch_model.py --out models/smollm2-135m

data/wiki/valid.txt: | venv
	$(BIN)/python tools/fetch_corpus.py --out data/wiki

smollm2: venv models/smollm2-135m/config.json data/wiki/valid.txt ## the same on a real language model
	$(BIN)/elsa-compile models/smollm2-135m -o build/smollm2-$(PRESET)/model.onnx \
	    --preset $(PRESET) --sparsity $(SPARSITY) --data data/wiki/train.txt \
	    --eval-data data/wiki/valid.txt --max-windows 50
	$(BIN)/elsa-compile models/smollm2-135m -o build/smollm2-dense/model.onnx \
	    --recipe examples/dense.yaml
	$(BIN)/elsa-run eval build/smollm2-$(PRESET)/model.onnx --data data/wiki/valid.txt --max-windows 50
	$(BIN)/elsa-run bench build/smollm2-$(PRESET)/model.onnx --against build/smollm2-dense/model.onnx
	$(BIN)/elsa-run generate build/smollm2-$(PRESET)/model.onnx --prompt "The city of"

clean: ## remove what was built
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache

.PHONY: help venv quickstart test slow lint smollm2 clean
.DEFAULT_GOAL := help
