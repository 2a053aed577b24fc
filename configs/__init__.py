"""Recipes as package data: `fura_rl.configs.path("demo.yaml")`."""

from importlib.resources import as_file, files
from pathlib import Path


def path(name: str) -> Path:
    """The file of a recipe that is installed with the package."""
    with as_file(files(__name__) / name) as file:
        return file
