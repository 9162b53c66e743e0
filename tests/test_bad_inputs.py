"""Every bad input of qa/bad_inputs.py, each refused in words and without a trace on the model."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import nn
from training_case import ROOT

pytest.importorskip("capruner.sparseml", exc_type=ImportError)
assert ROOT  # it puts the repository on the path
from qa import bad_inputs  # noqa: E402


@pytest.mark.promise(
    "Hostile input", "Every bad input of `qa/bad_inputs.py` is refused with a message and leaves the model unchanged"
)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["arguments", "tensors", "files", "recipes", "images"])
def test_bad_inputs_are_refused(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    found = [bad_inputs.judged(case) for case in bad_inputs.cases(tmp_path, [kind])]
    assert len(found) >= 50
    assert [(f.verdict, f.case.name, f.words) for f in found if f.verdict != "refused"] == []


def test_the_judge_sees_what_it_looks_for() -> None:
    model = nn.Linear(2, 2)

    def spoil() -> None:
        with torch.no_grad():
            model.weight.zero_()
        raise ValueError("a message that is long enough")

    def crash() -> None:
        raise KeyError("x")

    def curt() -> None:
        raise ValueError("bad")

    verdicts = [
        bad_inputs.judged(bad_inputs.Case("", "", a, model)).verdict for a in (lambda: None, crash, curt, spoil)
    ]
    assert verdicts == ["silent", "traceback", "traceback", "changed"]
