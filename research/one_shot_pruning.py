#!/usr/bin/env python
"""Prune a timm model in one shot: the command ``capruner prune`` under the name it has in the original repository."""

import sys

from capruner.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["prune", *sys.argv[1:]]))
