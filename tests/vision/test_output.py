"""Command lines, the folder of an experiment, its tables and pictures."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from capruner.cli import arguments as cli
from capruner.report.heatmap import shown
from capruner.vision import output, plots


def parser() -> cli.Parser:
    made = cli.Parser(description="trial")
    made.add_argument("--data-dir")
    made.add_argument("--model-kwargs", nargs="*", action=cli.KeyValues, default={})
    return made


def test_underscores_are_dashes_in_flags_and_stay_in_values():
    args = parser().parse_args(["--data_dir", "my_data", "--model_kwargs", "img_size=32"])
    assert (args.data_dir, args.model_kwargs) == ("my_data", {"img_size": 32})
    assert parser().parse_args(["--data_dir=my_data"]).data_dir == "my_data"


def test_key_values_are_python_literals_or_strings():
    line = ["--model-kwargs", "a=1", "b=0.5", "c=False", "d=gelu", "e=(2, 2)", "f=x=y"]
    assert parser().parse_args(line).model_kwargs == {
        "a": 1,
        "b": 0.5,
        "c": False,
        "d": "gelu",
        "e": (2, 2),
        "f": "x=y",
    }
    assert parser().parse_args([]).model_kwargs == {}


def test_a_key_without_a_value(capsys):
    with pytest.raises(SystemExit) as stop:
        parser().parse_args(["--model-kwargs", "img_size"])
    assert stop.value.code == 2
    assert "--model-kwargs wants KEY=VALUE, got 'img_size'" in capsys.readouterr().err


def test_a_mistake_is_one_line_and_debug_shows_the_traceback(capsys):
    def main(argv: object) -> None:
        raise cli.UserError("no such thing; take another")

    assert cli.run(main, []) == 2
    assert capsys.readouterr().err.splitlines()[0] == "error: no such thing; take another"
    with pytest.raises(cli.UserError):
        cli.run(main, ["--debug"])


def test_a_killed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "summary.json"
    output.write_json(path, {"a": 1})

    def broken(partial: Path) -> None:
        partial.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        output.write_atomically(path, broken)
    assert json.loads(path.read_text()) == {"a": 1}


def test_a_folder_does_not_outlive_a_mistake_but_an_earlier_run_does(tmp_path):
    def fail(parent: Path) -> Path:
        with pytest.raises(ValueError, match="no"), output.new_folder(str(parent), "trial") as folder:
            raise ValueError("no")
        return folder

    assert not fail(tmp_path).exists()
    assert tmp_path.exists()
    assert not fail(tmp_path / "new" / "output").parent.parent.exists()
    output.make_folder(str(tmp_path), "trial").joinpath("summary.json").write_text("{}")
    assert fail(tmp_path).joinpath("summary.json").exists()


@pytest.mark.parametrize("name", ["../up", "/root", "", "a/../../b"])
def test_an_experiment_stays_inside_the_output(tmp_path, name):
    with pytest.raises(cli.UserError, match="must be a name inside --output"):
        output.make_folder(str(tmp_path), name)


def test_what_killed_writers_left_in_an_experiment_goes(tmp_path):
    checkpoints = tmp_path / "trial" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / ".tmpAbCdEf").write_text("")
    (checkpoints / "last.safetensors").write_text("")
    (checkpoints.parent / ".capruner-12345678.partial").mkdir()
    output.make_folder(str(tmp_path), "trial")
    assert [path.name for path in checkpoints.iterdir()] == ["last.safetensors"]
    assert [path.name for path in checkpoints.parent.iterdir()] == ["checkpoints"]


def test_rows_of_unequal_columns(tmp_path):
    output.write_csv(tmp_path / "rows.csv", [{"a": 1}, {"a": 2, "b": 0.5}])
    with (tmp_path / "rows.csv").open() as file:
        assert list(csv.DictReader(file)) == [{"a": "1", "b": ""}, {"a": "2", "b": "0.5"}]


def test_a_table():
    shown = output.table([{"name": "dense"}, {"name": "CAP", "top1": 97.316}], {"name": "method", "top1": "top-1"})
    assert shown.splitlines() == ["method  top-1", "------  -----", "dense       -", "CAP     97.32"]


def test_labels_do_not_cover_each_other():
    assert plots._apart({"a": 10.0, "b": 90.0, "c": 12.0}, gap=5) == {"a": 10.0, "b": 90.0, "c": 15.0}
    heights = plots._apart(dict.fromkeys("abcd", 10.0), gap=5)
    assert sorted(heights.values()) == [10.0, 15.0, 20.0, 25.0]


def test_only_an_empty_layer_is_100_percent():
    assert [shown(share) for share in (0, 0.746, 0.9804, 0.9996, 1)] == ["0", "75", "98.0", "99.9", "100"]


def test_pictures(tmp_path):
    """Sparsity 0 and an empty layer, where a logarithm would fall off the axis, and more than one method."""
    curves = {"CAP": [(0.0, 90.0), (0.5, 89.0), (0.99, 50.0)], "magnitude": [(0.0, 90.0), (0.5, 70.0), (0.99, 10.0)]}
    layers = {s: [{"name": f"blocks.{i}.weight", "sparsity": i / 4} for i in range(5)] for s in (0.0, 0.5, 0.99)}
    plots.accuracy_vs_sparsity(tmp_path / "a.png", curves, 90.0, "title")
    plots.layer_sparsity(tmp_path / "b.png", dict.fromkeys(curves, layers), "title")
    for name in ("a.png", "b.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 200
            assert len(set(picture.convert("L").tobytes())) > 10
