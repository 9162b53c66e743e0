"""Knobs are declared once; keywords win over a config; what is unknown or invalid is named."""

from __future__ import annotations

import argparse
import inspect
import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from pruning_case import conv_net, images
from torch.nn import functional as F

import capruner
from capruner.config import Knobs, knobs, problems
from capruner.vision import one_shot_arguments


def test_every_function_has_the_defaults_of_the_config() -> None:
    for function in (capruner.prune, capruner.calibrate, capruner.plan, capruner.compensate_masks):
        parameters = inspect.signature(function).parameters
        shared = parameters.keys() & knobs().keys()
        assert shared == knobs().keys() or function is capruner.compensate_masks
        assert {"num_grads", "damp", "gradients"} <= shared
        assert {name: parameters[name].default for name in shared} == {name: knobs()[name].default for name in shared}


def test_type_checkers_see_the_fields_of_the_config() -> None:
    assert {name: knob.type for name, knob in knobs().items()} == {
        name: kind.__forward_arg__ for name, kind in Knobs.__annotations__.items()
    }


def test_every_knob_explains_itself() -> None:
    for name, knob in knobs().items():
        assert knob.help.endswith(".")
        assert f"    {name}: {knob.help[:20]}" in (capruner.prune.__doc__ or "")


def test_json_and_back() -> None:
    config = capruner.PruneConfig(
        damp=0.1, exclude=["head"], costs={"a": 1.0}, memory_budget="8GiB", fisher_inv_device=torch.device("cpu")
    )
    values = json.loads(json.dumps(config.to_dict()))
    assert capruner.PruneConfig.from_dict(values) == config
    assert values.keys() == knobs().keys()
    assert capruner.PruneConfig.from_dict({"num_grads": 3}) == capruner.PruneConfig(num_grads=3)


@pytest.mark.parametrize("call", [capruner.PruneConfig, lambda **k: capruner.PruneConfig.from_dict(k)])
def test_unknown_names(call: Any) -> None:
    with pytest.raises(TypeError, match=r"PruneConfig\(\) has no argument 'num_grad'; did you mean num_grads\?"):
        call(num_grad=3)


def test_unknown_keywords_of_a_call() -> None:
    with pytest.raises(TypeError, match=r"prune\(\) has no argument 'sparsities'; did you mean sparsity\?"):
        capruner.prune(conv_net(), images(), F.cross_entropy, sparsities=0.5)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"calibrate\(\) has no argument 'num_gards'; did you mean num_grads\?"):
        capruner.calibrate(conv_net(), images(), F.cross_entropy, num_gards=4)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "cab"}, "method must be one of .*got 'cab'"),
        ({"num_grads": True}, "num_grads must be a whole number, at least 1, got True"),
        ({"shrinkage": 2}, "shrinkage must be a number from 0 to 1"),
        ({"shrinkage": 0.5, "method": "magnitude"}, "shrinkage is for the Fisher blocks"),
        ({"fisher_block_size": 6, "mask_type": "2:4"}, "fisher_block_size must be a multiple of 4"),
        ({"num_recomputations": 2, "mask_type": "2:4"}, "num_recomputations must be 1, got 2"),
        ({"costs": {"a": 1.0}, "global_sparsity": False}, "costs say how layers compete"),
        ({"memory_budget": "lots"}, "memory_budget must be bytes or a size"),
        ({"global_sparsity": 1}, "global_sparsity must be True or False, got 1"),
        ({"exclude": [3]}, "exclude must be a name"),
    ],
)
def test_invalid_values_are_refused_when_the_config_is_made(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        capruner.PruneConfig(**values)


def test_keywords_win_over_the_config() -> None:
    config = capruner.PruneConfig(num_grads=5, damp=0.3, fisher_block_size=8, gradients="sample")
    result = capruner.prune(
        conv_net(), images(), F.cross_entropy, 0.5, config=config, damp=None, num_grads=7, progress=False
    )
    assert (result.settings["num_grads"], result.settings["damp"]) == (
        7,
        0.01,
    )  # None, although it is the default, wins
    assert (result.settings["fisher_block_size"], result.settings["gradients"]) == (8, "sample")
    with pytest.raises(ValueError, match=r"config must be a capruner\.PruneConfig"):
        capruner.prune(conv_net(), images(), F.cross_entropy, 0.5, config={"damp": 1.0})  # type: ignore[arg-type]


def test_recipes_and_the_command_line_have_the_same_number_of_gradients() -> None:
    from capruner.recipes import values

    number = capruner.PruneConfig.num_grads
    assert values.CAP["num_grads"] == values.FAST_CAP["num_grads"] == number
    parser = argparse.ArgumentParser()
    one_shot_arguments.add_arguments(parser)
    args = one_shot_arguments.checked(parser.parse_args(["--data-dir", ".", "--model", "resnet18", "--pretrained"]))
    assert one_shot_arguments.one_shot(args).knobs["num_grads"] == number


def test_every_problem_is_found() -> None:
    assert problems({"damp": 0.1, "labels": "data"}) == []
    assert [text.partition(" ")[0] for text in problems({"damp": 0, "labels": "x", "num_grads": 3})] == [
        "damp",
        "labels",
    ]
    (together,) = problems({"mask_type": "2:4", "num_recomputations": 2})
    assert "num_recomputations must be 1" in together


def test_the_reference_table_has_a_row_for_every_knob() -> None:
    table = runpy.run_path(str(Path(__file__).parents[1] / "docs" / "hooks.py"))["reference_table"]()
    head, rule, *rows = table.splitlines()
    assert head.count("|") == rule.count("|") == 5
    assert [row.split("`")[1] for row in rows] == list(knobs())
    assert "| `num_grads` | `'auto'` | cap, fast_cap, obs | Gradients that" in table


@pytest.mark.parametrize("name", sorted(knobs().keys() - {"costs"}))
def test_a_default_is_valid_and_survives_its_conversion(name: str) -> None:
    knob = knobs()[name]
    knob.kind.check(name, knob.default)
    again = knob.kind.convert(knob.default)
    assert (tuple(again) if name == "exclude" else again) == knob.default
