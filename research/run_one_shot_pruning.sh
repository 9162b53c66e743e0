#!/usr/bin/env bash
# One-shot pruning of a DeiT-Small: CAP, SparseML's OBS and global magnitude at the same sparsities.
# Usage: DATA_DIR=/path/to/imagenet research/run_one_shot_pruning.sh [more arguments of one_shot_pruning.py]
# Paths are relative to where it is started. Without --checkpoint it starts from timm's pretrained weights.
set -euo pipefail
: "${DATA_DIR:?set DATA_DIR to a folder with train/ and val/}"
ROOT=$(cd "$(dirname "$0")/.." && pwd)
MODEL=${MODEL:-deit_small_patch16_224}
FAMILY=${FAMILY:-vit}
GRAD_SAMPLER_BATCH_SIZE=${GRAD_SAMPLER_BATCH_SIZE:-16}
PYTHON=${PYTHON:-python}
weights=(--pretrained)
for word in "$@"; do
  case $word in --checkpoint | --checkpoint=* | --initial[-_]checkpoint* | --checkpoint[-_]path* | --random[-_]weights) weights=() ;; esac
done
for method in ${METHODS:-cap obs gm}; do
  "$PYTHON" "$ROOT/research/one_shot_pruning.py" --data-dir "$DATA_DIR" --model "$MODEL" ${weights[@]+"${weights[@]}"} \
    --sparseml-recipe "$ROOT/research/recipes/one_shot/$method/$FAMILY.yaml" --sparsities 0.5 0.6 0.7 0.75 0.8 0.9 \
    -gb "$GRAD_SAMPLER_BATCH_SIZE" --experiment "one-shot/$MODEL-$method" "$@"
done
