"""Everything is declared in pyproject.toml. This file answers `python setup.py install`, which old instructions use."""

import sys

import setuptools

if sys.version_info < (3, 11) or int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit("capruner needs Python 3.11 or newer and setuptools 77 or newer; `python3.11 -m pip install .` sees to it")

setuptools.setup()
