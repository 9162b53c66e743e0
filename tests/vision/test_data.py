"""Image folders as loaders: what they refuse, what they yield, in which order."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from training_case import SMALLER as KWARGS

pytest.importorskip("timm")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import timm

from capruner.cli.arguments import UserError
from capruner.vision import data


def model(**kwargs: Any) -> torch.nn.Module:
    return timm.create_model("vit_tiny_patch16_224", **KWARGS | kwargs)


def config(module: torch.nn.Module, **given: Any) -> dict[str, Any]:
    flags = dict.fromkeys(("img_size", "mean", "std", "crop_pct", "interpolation", "checkpoint"))
    flags |= {"model_kwargs": KWARGS, "model": "vit_tiny_patch16_224"} | given
    return data.preprocessing(SimpleNamespace(**flags), module)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes; every pixel of train image i has the value 10 · i."""
    for split, count in (("train", 5), ("val", 2)):
        for number, name in enumerate(("cat", "dog")):
            place = tmp_path / split / name
            place.mkdir(parents=True)
            for i in range(count):
                value = 10 * (number * count + i)
                Image.fromarray(np.full((16, 16, 3), value, np.uint8)).save(place / f"{i}.png")
    return tmp_path


def values(batches: Any) -> list[list[int]]:
    """The pixel value of each image, undoing mean 0 and standard deviation 1."""
    return [[round(255 * float(image.mean())) for image in inputs[0]] for inputs, _, _ in batches]


def calibration(folder: Path, seed: int = 1, batch_size: int = 4, augment: bool = False) -> data.CalibrationBatches:
    module = model()
    train, _ = data.open_splits(str(folder), "", module)
    plain = config(module, mean=[0.0] * 3, std=[1.0] * 3)
    return data.CalibrationBatches(train, plain, batch_size, 0, augment, seed, torch.device("cpu"))


def test_labels_follow_the_folder_names(folder):
    module = model()
    train, val = data.open_splits(str(folder), "", module)
    images, labels = next(iter(data.loader(val, config(module), 4, 0)))
    assert images.shape == (4, 3, 16, 16)
    assert labels.tolist() == [0, 0, 1, 1]
    assert (len(train), len(val)) == (10, 4)


def test_calibration_is_shuffled_by_the_seed_and_sees_every_image_once_per_pass(folder):
    first, again, other = (values(itertools.islice(calibration(folder, seed)(), 3)) for seed in (1, 1, 2))
    assert first == again != other
    assert sorted(itertools.chain(*first)) == [10 * i for i in range(10)]
    assert [len(batch) for batch in first] == [4, 4, 2]


def test_a_second_pass_and_a_second_call_draw_another_order(folder):
    batches = calibration(folder, batch_size=10)
    one, two = values(itertools.islice(batches(None), 2))
    (three,) = values(itertools.islice(batches({}), 1))
    assert sorted(one) == sorted(two) == sorted(three)
    assert one != two != three != one


def test_calibration_images_are_those_of_evaluation_unless_augmented(folder):
    plain = next(calibration(folder, batch_size=10)())
    assert all(image.max() == image.min() for image in plain[0][0])
    seen = sorted(values([plain])[0])
    torch.manual_seed(0)
    augmented = sorted(values([next(calibration(folder, batch_size=10, augment=True)())])[0])
    assert seen == [10 * i for i in range(10)] != augmented


def test_a_recipe_may_set_the_batch_size_and_nothing_else(folder):
    batches = calibration(folder)
    assert len(next(batches({"batch_size": 2}))[2]) == 2
    assert len(next(batches(batch_size=3, device=None))[2]) == 3
    with pytest.raises(UserError, match=r"grad_sampler_kwargs: \['drop_last'\] mean nothing here"):
        next(batches({"drop_last": True}))


def test_classes_that_do_not_match_the_model(folder):
    with pytest.raises(UserError, match=r"has 2 classes, the model 7 outputs.*num_classes=2"):
        data.open_splits(str(folder), "", model(num_classes=7))


def test_classes_that_differ_between_the_splits(folder):
    (folder / "val" / "dog").rename(folder / "val" / "wolf")
    with pytest.raises(UserError, match=r"val has no images of 'dog', which train has as class folders"):
        data.open_splits(str(folder), "", model())


def test_a_folder_without_a_split_or_without_images(folder):
    (folder / "val").rename(folder / "holdout")
    with pytest.raises(UserError, match=r"has no folder val/ \(looked for val, validation, valid, test\)"):
        data.open_splits(str(folder), "", model())
    (folder / "test" / "cat").mkdir(parents=True)
    with pytest.raises(UserError, match=r"test holds no image \(.jpg, .jpeg, .png\) in a class folder"):
        data.open_splits(str(folder), "", model())


def test_one_channel(folder):
    module = model(in_chans=1)
    train, _ = data.open_splits(str(folder), "", module)
    options = config(module, model_kwargs=KWARGS | {"in_chans": 1}, mean=[0.2, 0.3, 0.4])
    assert options["mean"] == pytest.approx((0.3,))
    images, _ = next(iter(data.loader(train, options, 2, 0)))
    assert images.shape == (2, 1, 16, 16)
    assert module(images).shape == (2, 2)


def test_preprocessing_comes_from_the_model_where_no_flag_says_otherwise():
    module = model()
    assert config(module)["input_size"] == (3, 16, 16)  # the model's own configuration says 224
    assert config(module)["mean"] == (0.5, 0.5, 0.5)
    given = config(module, img_size=32, std=[0.1, 0.2, 0.3], crop_pct=1.0)
    assert (given["input_size"], given["std"], given["crop_pct"]) == ((3, 32, 32), (0.1, 0.2, 0.3), 1.0)
    with pytest.raises(UserError, match="--mean has 2 values, the model's input 3 channels"):
        config(module, mean=[0.1, 0.2])


def test_a_checkpoint_whose_preprocessing_nobody_gave_gets_a_note(capsys):
    module = model()
    config(module)
    config(module, checkpoint="mine.pth", mean=[0.1, 0.2, 0.3])
    assert capsys.readouterr().err == ""
    config(module, checkpoint="mine.pth")
    told = capsys.readouterr().err
    assert (
        "--mean 0.5 0.5 0.5 --std 0.5 0.5 0.5 --crop-pct 0.9; pass the preprocessing that mine.pth was trained with"
        in told
    )


def test_a_limit_takes_the_same_images_each_time(folder):
    module = model()
    plain = config(module, mean=[0.0] * 3, std=[1.0] * 3)
    train, _ = data.open_splits(str(folder), "", module)
    runs = [
        values([([images], {}, labels)])
        for _ in range(2)
        for images, labels in data.loader(train, plain, 9, 0, limit=4)
    ]
    assert runs[0] == runs[1]
    assert len(runs[0][0]) == 4
