#!/usr/bin/env bash
# Gradual pruning of a DeiT-Small on all GPUs of this machine; started again after a crash or a power cut, it goes on where it was.
# Usage: DATA_DIR=/path/to/imagenet research/run_gradual_pruning.sh [more arguments of sparse_training.py]
# Paths are relative to where it is started; RECIPE and CONFIG also to the repository. Without --checkpoint it starts from timm's pretrained weights.
set -euo pipefail
: "${DATA_DIR:?set DATA_DIR to a folder with train/ and val/}"
ROOT=$(cd "$(dirname "$0")/.." && pwd)
MODEL=${MODEL:-deit_small_patch16_224}
RECIPE=${RECIPE:-$ROOT/research/recipes/gradual_pruning/cap/vit_300ep_0.40_0.60_0.75_0.90.yaml}
CONFIG=${CONFIG:-$ROOT/research/configs/deit.yaml}
[ -e "$RECIPE" ] || RECIPE=$ROOT/$RECIPE
[ -e "$CONFIG" ] || CONFIG=$ROOT/$CONFIG
BATCH_SIZE=${BATCH_SIZE:-128}                          # per process
GRAD_SAMPLER_BATCH_SIZE=${GRAD_SAMPLER_BATCH_SIZE:-16} # images per gradient sample
EXPERIMENT=${EXPERIMENT:-gradual/$MODEL-$(basename "$RECIPE" .yaml)}
PYTHON=${PYTHON:-python}
weights=(--pretrained)
for word in "$@"; do
  case $word in --checkpoint | --checkpoint=* | --initial[-_]checkpoint* | --checkpoint[-_]path* | --random[-_]weights) weights=() ;; esac
done
if [ -z "${NPROC:-}" ]; then
  NPROC=$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')
fi
launch=("$PYTHON")
[ "$NPROC" -gt 1 ] && launch+=(-m torch.distributed.run --standalone --nproc-per-node="$NPROC")
exec "${launch[@]}" "$ROOT/research/sparse_training.py" --data-dir "$DATA_DIR" --model "$MODEL" ${weights[@]+"${weights[@]}"} --config "$CONFIG" \
  --sparseml-recipe "$RECIPE" -b "$BATCH_SIZE" -gb "$GRAD_SAMPLER_BATCH_SIZE" --amp --experiment "$EXPERIMENT" --resume "$@"
