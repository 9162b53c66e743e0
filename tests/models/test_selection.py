"""Which parameters an entry of ``params`` stands for, and what is refused."""

from __future__ import annotations

import os
import re

import pytest
import torch
from torch import nn

from capruner.models.selection import SelectionError, select, select_parameters
from capruner.models.wrappers import unwrap


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(4, 12), nn.Linear(4, 4)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 4)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn, self.mlp = nn.LayerNorm(4), Attention(), Mlp()


class Vit(nn.Module):
    """The parameter names of a timm ViT, with two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 4))
        self.patch_embed = nn.Conv2d(3, 4, 2)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(4, 10)


@pytest.fixture
def vit() -> Vit:
    return Vit()


IN_A_BLOCK = ["attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"]
IN_BLOCKS = [f"blocks.{i}.{name}" for i in range(2) for name in IN_A_BLOCK]


def names(model: nn.Module, params) -> list[str]:
    return list(select_parameters(model, params))


def message(model: nn.Module, params) -> str:
    with pytest.raises(SelectionError) as caught:
        select_parameters(model, params)
    return str(caught.value)


# What an entry stands for


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ("head.weight", ["head.weight"]),
        ("pos_embed", ["pos_embed"]),
        ("head.bias", ["head.bias"]),
        ("head", ["head.weight"]),
        ("patch_embed", ["patch_embed.weight"]),
        ("blocks.1.attn", ["blocks.1.attn.qkv.weight", "blocks.1.attn.proj.weight"]),
        ("blocks", IN_BLOCKS),
        ("__ALL_PRUNABLE__", ["patch_embed.weight", *IN_BLOCKS, "head.weight"]),
        (r"re:blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))\.weight", IN_BLOCKS),
        (r"re:.*qkv\.weight$", ["blocks.0.attn.qkv.weight", "blocks.1.attn.qkv.weight"]),
        ("re:head", ["head.weight", "head.bias"]),  # re.match: the end is open
        (
            ["head", "blocks.0.mlp", "head.weight"],
            ["blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight", "head.weight"],
        ),
        (("head", "re:.*fc1.bias"), ["blocks.0.mlp.fc1.bias", "blocks.1.mlp.fc1.bias", "head.weight"]),
    ],
)
def test_entries(vit, params, expected):
    assert names(vit, params) == expected


def test_all_is_every_parameter_in_order_and_the_parameters_are_the_models_own(vit):
    selected = select_parameters(vit, "__ALL__")
    assert list(selected) == [name for name, _ in vit.named_parameters()]
    assert all(selected[name] is parameter for name, parameter in vit.named_parameters())


def test_a_pattern_matches_from_the_start(vit):
    assert "no parameter name matches" in message(vit, "re:attn.qkv.weight")


def test_a_model_that_is_one_layer():
    assert names(nn.Linear(2, 3), "__ALL_PRUNABLE__") == ["weight"]


# Wrappers and ties


def test_data_parallel_is_looked_through(vit):
    wrapped = nn.DataParallel(vit)
    assert unwrap(wrapped) is vit
    assert unwrap(nn.DataParallel(wrapped)) is vit
    assert select_parameters(wrapped, "blocks.0.attn") == select_parameters(vit, "blocks.0.attn")
    assert names(wrapped, "re:blocks.0.attn.qkv.weight") == ["blocks.0.attn.qkv.weight"]


def test_distributed_data_parallel_is_looked_through(vit, tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("no torch.distributed")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(vit)
        assert unwrap(wrapped) is vit
        assert names(wrapped, "re:(patch_embed|blocks).*weight$")[0] == "patch_embed.weight"
    finally:
        torch.distributed.destroy_process_group()


def test_a_module_of_the_models_own_called_module_is_no_wrapper():
    model = nn.Module()
    model.module = nn.Linear(2, 2)
    assert unwrap(model) is model
    assert names(model, "__ALL_PRUNABLE__") == ["module.weight"]


@pytest.mark.parametrize(
    "params", ["head", "head.weight", "re:head.weight", "embed.weight", ["head", "embed.weight"], "__ALL__"]
)
def test_a_tied_parameter_appears_once_under_its_first_name(params):
    model = nn.Module()
    model.embed, model.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    model.head.weight = model.embed.weight
    assert names(model, params) == ["embed.weight"]


def test_a_shared_layer_appears_once():
    layer = nn.Linear(2, 2)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    assert names(model, "__ALL_PRUNABLE__") == names(model, "2") == ["0.weight"]


# What matches nothing


@pytest.mark.parametrize("empty", [[], ()])
def test_empty_params(vit, empty):
    assert "empty" in message(vit, empty)
    assert "__ALL_PRUNABLE__" in message(vit, empty)


@pytest.mark.parametrize(
    ("params", "entry", "near"),
    [
        ("haed", "haed", "head"),
        (["head", "blocks.0.attn.qvk.weight"], "blocks.0.attn.qvk.weight", "blocks.0.attn.qkv.weight"),
        ("re:.*atn.qkv.weight", "re:.*atn.qkv.weight", "attn.qkv.weight"),
        ("re:module.blocks.0.mlp.fc1.weight", "module.blocks", "blocks.0.mlp.fc1.weight"),
        ("", "''", "pos_embed"),
    ],
)
def test_an_entry_that_matches_nothing_is_named_with_the_nearest_names(vit, params, entry, near):
    text = message(vit, params)
    assert entry in text
    assert near in text.split("nearest" if "nearest" in text else "there are")[1]


def test_where_nothing_is_near_no_nearness_is_claimed(vit):
    text = message(vit, "re:xyzzy")
    assert "nearest" not in text
    assert "there are pos_embed" in text
    assert "more" in text


def test_a_module_without_prunable_layers(vit):
    assert "holds no Linear, convolution, attention or recurrent layer" in message(vit, "blocks.0.norm1")
    assert "'__ALL_PRUNABLE__'" in message(nn.LayerNorm(3), "__ALL_PRUNABLE__")
    assert "'__ALL__'" in message(nn.ReLU(), "__ALL__")


def test_an_entry_that_is_no_string(vit):
    assert "3" in message(vit, ["head", 3])


@pytest.mark.parametrize("pattern", ["re:(attn", "re:[a-", "re:*x", "re:(?P<n>a)(?P<n>b)"])
def test_an_invalid_pattern(vit, pattern):
    text = message(vit, pattern)
    assert pattern in text
    assert "not a regular expression" in text


# Alternatives


@pytest.mark.parametrize(
    ("pattern", "dead"),
    [
        ("re:head|tail", "tail"),
        (r"re:.*(attn\.qkv|attn\.pr0j)\.weight", r"attn\.pr0j"),
        (r"re:blocks\.\d+\.(attn\.(qkv|prj)|mlp\.fc1)", "prj"),  # its outer siblings match
        (r"re:blocks\.\d+\.(attn\.(?:q|qkv)\.weight|mlp\.(fc1|fc3))", "q"),
        (r"re:.*(?P<layer>fc1|fc9)\.weight", "fc9"),
        (r"re:(blocks|head)\..*(weight|wait)", "wait"),
        (r"re:blocks\.[01|]\.mlp|heed", "heed"),  # the | in the class is a character
        (r"re:blocks\.0\.mlp(\.fc1|\|)", r"\|"),  # an escaped | is a character
        (r"re:(?i:HEAD|TAIL)", "TAIL"),
        (r"re:(?i)HEAD|TAIL", "TAIL"),
        (r"re:(?#either|or)(head|tail)", "tail"),
        (r"re:blocks(?=\.0|\.7).*weight", r"\.7"),
        (r"re:.*(?<=head|tail)\.weight", "tail"),
        (r"re:((((head|((tail))))))", "((tail))"),
        (r"re:[]|]|head", "[]|]"),
        (r"re:[^]a]*(head|tail)", "tail"),
        (r"re:(b)locks|(?P<c>c)(?P=c)|head", "(?P<c>c)(?P=c)"),
    ],
)
def test_a_dead_alternative_is_named(vit, pattern, dead):
    assert re.match(pattern[3:], "head.weight") or any(
        re.match(pattern[3:], name) for name, _ in vit.named_parameters()
    ), "the pattern as a whole matches, so that SparseML would not complain"
    text = message(vit, pattern)
    assert f"the alternative '{dead}' of '{pattern}'" in text


@pytest.mark.parametrize(
    "pattern",
    [
        "re:head|blocks",
        "re:head.weight|head.bias",
        "re:(head|head.weight)",  # one hides the other, both match
        r"re:blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc1|fc2))\.(weight|bias)",
        r"re:(?:[a-z_]|[0-9]|\.)+weight",  # matches only together
        r"re:(?!head|patch|absent).*weight",  # excludes: an exclusion need not occur
        r"re:(.)(l|e)(?:ocks|ad).*\1?",
        r"re:blocks[.|]0",
        r"re:blocks\.(0|1)(?#|none).*",
        "re:(|head).*weight",
    ],
)
def test_patterns_whose_alternatives_all_match(vit, pattern):
    assert names(vit, pattern) == [name for name, _ in vit.named_parameters() if re.match(pattern[3:], name)] != []


def test_the_dead_alternative_of_one_entry_is_found_beside_good_entries(vit):
    text = message(vit, ["head", r"re:.*(mlp\.fc1|mlp\.fc3)\.weight"])
    assert r"mlp\.fc3" in text
    assert "mlp.fc" in text.split("nearest")[1]


@pytest.mark.parametrize(
    "pattern",
    [
        "re:.*attn.[qkv].weight",  # alone
        r"re:.*(attn.[qkv].weight|attn.proj.weight|mlp.fc\d.weight)",  # beside alternatives that match
    ],
)
def test_a_class_of_letters_that_was_meant_as_a_word(vit, pattern):
    text = message(vit, pattern)
    assert "[qkv] stands for one single letter" in text
    assert "attn.qkv.weight" in text


def test_no_such_hint_where_the_word_would_not_match_either(vit):
    assert "single letter" not in message(vit, "re:.*attn.[xyz].weight")


def test_a_class_of_letters_that_matches_is_fine():
    model = nn.Module()
    model.q, model.k, model.v = (nn.Linear(2, 2) for _ in range(3))
    assert names(model, "re:[qkv].weight") == ["q.weight", "k.weight", "v.weight"]


# What cannot be pruned


def test_frozen_parameters_are_passed_over_with_one_line(vit, caplog):
    vit.blocks[0].requires_grad_(False)
    vit.pos_embed.requires_grad_(False)
    for params in ("__ALL_PRUNABLE__", "blocks", "re:.*weight$", "__ALL__", ["head", "blocks"]):
        caplog.clear()
        selection = select(vit, params)
        assert not any(name.startswith("blocks.0") for name in selection.parameters)
        assert "blocks.1.mlp.fc1.weight" in selection.parameters
        assert selection.passed["blocks.0.mlp.fc1.weight"].startswith("frozen")
        assert len(caplog.records) == 1
        assert "blocks.0.attn.qkv.weight" in caplog.text
    assert "blocks.0.mlp.fc1.weight" in select_parameters(vit, "__ALL_PRUNABLE__", trainable=False)


@pytest.mark.parametrize(
    "params", ["blocks.0", "blocks.0.mlp.fc1.weight", r"re:blocks\.0.*weight", ["head", "blocks.0.mlp.fc1"]]
)
def test_an_entry_that_is_frozen_as_a_whole_is_an_error_with_the_remedy(vit, params):
    vit.blocks[0].requires_grad_(False)
    text = message(vit, params)
    assert "blocks.0.mlp.fc1.weight" in text
    assert "requires_grad_(True)" in text


def test_a_long_list_of_frozen_parameters_is_cut(vit):
    vit.requires_grad_(False)
    assert "and 5 more" in message(vit, "__ALL_PRUNABLE__")  # of ten


# Exclusions


@pytest.mark.parametrize(
    "exclude",
    ["blocks", ["blocks.0", "blocks.1"], r"re:blocks\..*", [*IN_BLOCKS], ["blocks.0", r"re:blocks\.1\.(attn|mlp)"]],
)
def test_exclusions(vit, exclude):
    selection = select(vit, "__ALL_PRUNABLE__", exclude)
    assert list(selection.parameters) == ["patch_embed.weight", "head.weight"]
    assert all(selection.passed[name] == "excluded" for name in IN_BLOCKS)
    assert list(select_parameters(vit, ["head", "blocks"], exclude)) == ["head.weight"]


def test_an_exclusion_may_be_frozen_and_has_to_match_something(vit):
    vit.head.requires_grad_(False)
    assert list(select_parameters(vit, ["head", "patch_embed"], "head")) == ["patch_embed.weight"]
    for exclude, text in (
        ("haed", "exclude: no parameter.*'haed'.*head"),
        ("re:x", "exclude: no parameter name"),
        ([3], "must be a string"),
    ):
        with pytest.raises(SelectionError, match=text):
            select(vit, "__ALL_PRUNABLE__", exclude)
    with pytest.raises(SelectionError, match="nothing is left to prune"):
        select(vit, "blocks", "blocks")


def test_parameters_that_are_not_floating_point():
    model = nn.Sequential(nn.Linear(2, 2))
    model.register_parameter("steps", nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False))
    text = message(model, "__ALL__")
    assert "not floating point" in text
    assert "steps" in text
    assert "0.weight" not in text


def test_weights_that_are_computed_from_others(caplog):
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), nn.Linear(2, 2))
    text = message(model, "0")
    assert "0.weight" in text
    assert "parametrization" in text
    assert names(model, "1") == ["1.weight"]
    selection = select(model, "__ALL_PRUNABLE__")
    assert list(selection.parameters) == ["1.weight"]
    assert "parametrization" in selection.passed["0.weight"]
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_weights_without_a_shape_yet():
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))
    assert "0.weight" in message(model, "__ALL_PRUNABLE__")
    assert names(model, "1") == ["1.weight"]


def test_errors_are_value_errors_and_the_model_is_left_alone(vit):
    before = {name: parameter.clone() for name, parameter in vit.named_parameters()}
    with pytest.raises(ValueError, match="no parameter or module"):
        select_parameters(vit, "nothing")
    assert all(torch.equal(before[name], parameter) for name, parameter in vit.named_parameters())


def test_no_gradient_or_environment_is_touched(vit):
    environment = dict(os.environ)
    select_parameters(vit, "__ALL__")
    assert environment == dict(os.environ)
    assert all(parameter.grad is None for parameter in vit.parameters())
