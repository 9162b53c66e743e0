"""One real pruning update through ``sparse_training.py`` on timm models of many families, made small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from training_case import Line, rows, updates

pytest.importorskip("timm")
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning:timm")
from capruner.vision import sparse_training  # noqa: E402

FAMILIES: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "deit_tiny_distilled_patch16_224": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "xcit_nano_12_p16_224": {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "swin_tiny_patch4_window7_224": {
        "img_size": 32,
        "window_size": 4,
        "embed_dim": 16,
        "depths": [1, 1],
        "num_heads": [1, 2],
    },
    "convnext_atto": {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]},
    "resnet18": {"channels": [8, 16, 24, 32]},
    "mobilenetv2_035": {},  # an EfficientNet to timm
    "mobilenetv3_small_050": {},
}
RECIPE = """
modifiers:
  - !EpochRangeModifier
      start_epoch: 0.0
      end_epoch: 1.0
  - !{modifier}
      params: __ALL_PRUNABLE__
      init_sparsity: 0.75
      final_sparsity: 0.75
      start_epoch: 0.0
      end_epoch: 1.0
      update_frequency: 1.0
      num_grads: 4
      damp: 1e-2
      fisher_block_size: 16
"""


@pytest.mark.parametrize("modifier", ["CAPruningModifier", "FastCAPruningModifier"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_and_prunes(family: str, modifier: str, line: Line, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(modifier=modifier))
    sizes = [f"{key}={value}".replace(" ", "") for key, value in FAMILIES[family].items()]
    arguments = line(
        model=family,
        model_kwargs=[*sizes, "num_classes=3"],
        sparseml_recipe=tmp_path / "recipe.yaml",
        img_size=None if "img_size" in FAMILIES[family] else 32,
        batch_size=8,
    )
    sparse_training.main(arguments)
    folder = tmp_path / "trial"
    assert [sparsity for _, sparsity in updates(folder)] == pytest.approx(
        [0.75, 0.75], abs=1e-3
    )  # at the start, at the end
    assert float(rows(folder)[-1]["sparsity"]) == pytest.approx(0.75, abs=1e-3)
    layers = json.loads((folder / "layer_sparsity.json").read_text())[-1]["layers"]
    assert len(layers) > 4
    each = {round(row["zeros"] / row["numel"], 2) for row in layers}
    assert (len(each) > 1) == (modifier == "CAPruningModifier")  # one target over all layers; FastCAP: the same in each
