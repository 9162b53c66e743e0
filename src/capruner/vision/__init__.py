"""Pruning of timm models on image folders: models, data, evaluation, experiment folders, one-shot and gradual runs.

Needs timm, torchvision and matplotlib: ``pip install 'capruner[vision]'``. The modules of arguments import without them, so that ``--help`` always works.
"""
