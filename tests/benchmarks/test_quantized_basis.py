"""The two forms in which a block's weight can be quantised."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("bitsandbytes", reason="the extra 'quantized' is not installed")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import quantized_basis


@pytest.fixture
def weight():
    return torch.randn(256, 128, generator=torch.Generator().manual_seed(0)) * 0.02


def error(form, weight):
    return float((form - weight).norm() / weight.norm())


def test_without_rounding_every_form_is_the_weight(weight, monkeypatch):
    monkeypatch.setattr(quantized_basis, "nf4", lambda tensor: tensor)
    for name, form in quantized_basis.quantised_forms(weight, 16).items():
        assert error(form, weight) < 1e-5, name


def test_rounding_costs_a_tenth_and_a_fitted_factor_less(weight):
    errors = {name: error(form, weight) for name, form in quantized_basis.quantised_forms(weight, 16).items()}
    assert list(errors) == list(quantized_basis.FORMS)
    assert all(0.08 < value < 0.1 for value in errors.values())
    for name in ("weight", "factor"):
        assert errors[f"{name}_fitted"] < errors[name]
