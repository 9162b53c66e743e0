"""MNN: a maintained engine that skips unstructured zeros on x86 and ARM CPUs.

Conversion calls the C extension ``_tools`` of the MNN package. ``MNN.tools``, its documented Python front end, must not be imported: it installs packages with
pip and uploads the file sizes and the machine's id.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from capruner.deploy.engines import load_mnn

_CONVERT = """
import sys
try:
    import _tools
except ModuleNotFoundError:
    sys.exit("MNN is not installed")
words = ["mnnconvert", "--framework", "ONNX", "--modelFile", sys.argv[1], "--MNNModel", sys.argv[2]]
sys.exit(not _tools.mnnconvert([*words, "--bizCode", "capruner", "--detectSparseSpeedUp"]))
"""


def convert(source: Path, target: Path, python: str = sys.executable) -> Path:
    """Convert an ONNX file to MNN's format; layers with enough zeros (60 % in MNN 3.6) are stored and run sparse.

    The converter is C++ that prints, and may abort: it runs in a process.

    Args:
        source: ONNX.
        target: the file to write.
        python: interpreter of an environment that has the package MNN.

    Returns:
        ``target``.

    Raises:
        ModuleNotFoundError: MNN is not installed there.
        RuntimeError: MNN does not support the model.
    """
    done = subprocess.run(
        [python, "-c", _CONVERT, str(source), str(target)],
        capture_output=True,
        text=True,
        errors="replace",
        env=os.environ | {"PYTHONSAFEPATH": "1"},
    )
    if "MNN is not installed" in done.stderr:
        raise ModuleNotFoundError("MNN is not installed: pip install 'capruner[mnn]'", name="MNN")
    if done.returncode or not target.is_file():
        last = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()][-3:]
        raise RuntimeError(f"MNN cannot convert {source.name}: {' / '.join(last) or f'exit code {done.returncode}'}")
    return target


def load(file: Path, threads: int = 1) -> Callable[[np.ndarray], np.ndarray]:
    """A function from images to outputs that runs a converted model."""
    with _silence():
        return load_mnn({"file": str(file), "threads": threads})


@contextmanager
def _silence() -> Iterator[None]:
    """Drop what C++ prints while a library loads."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(descriptor) for descriptor in (1, 2)]
    with tempfile.TemporaryFile() as sink:
        try:
            for descriptor in (1, 2):
                os.dup2(sink.fileno(), descriptor)
            yield
        finally:
            for descriptor, copy in zip((1, 2), saved):
                os.dup2(copy, descriptor)
                os.close(copy)
