"""Folders of the checkout."""

import pathlib

HELPERS = pathlib.Path(__file__).resolve().parent
ROOT = HELPERS.parents[1]
