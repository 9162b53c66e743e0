#!/usr/bin/env python
"""Train a timm model while a recipe prunes it: the command ``capruner train`` under the name it has in the original repository."""

import sys

from capruner.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
