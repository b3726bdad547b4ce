"""What tests of moments and of solving share."""

import pytest


@pytest.fixture
def problem(randn):
    """K (12, 5), R (4, 5), C (12, 12) of full rank."""
    x = randn(12, 200)
    return randn(12, 5), randn(4, 5), x @ x.T / 200


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("RETCON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
