#!/bin/sh
# The length of the ELSA paper's recipe on one GPU: 4096 steps, all pruners that train, five
# sparsities, SmolLM2-135M. Stops by itself after MINUTES (9) and goes on where it stopped when
# started again; rows, table and plot lie in OUT (build/paper) all along.
#
#     tools/fetch_model.py --out models/smollm2-135m
#     tools/fetch_corpus.py --corpus wiki sotu moby-dick --out data/all
#     tools/fetch_corpus.py --out data/wiki
#     MINUTES=9 sh tools/paper_recipe.sh
set -eu
exec "${PYTHON:-python3}" tools/compare_pruners.py "${MODEL:-models/smollm2-135m}" \
    --data "${DATA:-data/all/train.txt}" --eval-data "${EVAL:-data/wiki/valid.txt}" \
    --window 1024 --steps 4096 --batch-size 8 --sparsity 0.9 0.7 0.5 0.8 0.95 \
    --methods dense elsa elsa-l sparsegpt+train dense+train \
    --device "${DEVICE:-cuda}" --minutes "${MINUTES:-9}" --out "${OUT:-build/paper}" "$@"
