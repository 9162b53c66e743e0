#!/usr/bin/env bash
# One-shot pruning of a DeiT-Small: CAP, SparseML's OBS and global magnitude at the same sparsities.
# Usage: DATA_DIR=/path/to/imagenet research/run_one_shot_pruning.sh [more arguments of one_shot_pruning.py]
set -euo pipefail
: "${DATA_DIR:?set DATA_DIR to a folder with train/ and val/}"
MODEL=${MODEL:-deit_small_patch16_224}
FAMILY=${FAMILY:-vit}
GRAD_SAMPLER_BATCH_SIZE=${GRAD_SAMPLER_BATCH_SIZE:-16}
cd "$(dirname "$0")/.."
for method in ${METHODS:-cap obs gm}; do
  python research/one_shot_pruning.py --data-dir "$DATA_DIR" --model "$MODEL" --pretrained \
    --sparseml-recipe "research/recipes/one_shot/$method/$FAMILY.yaml" --sparsities 0.5 0.6 0.7 0.75 0.8 0.9 \
    -gb "$GRAD_SAMPLER_BATCH_SIZE" --experiment "one-shot/$MODEL-$method" "$@"
done
