"""Torch's switches are set for a run, and put back behind it."""

from __future__ import annotations

import os

import pytest
import torch

from engine.distributed.arithmetic import CUBLAS_WORKSPACE, arithmetic


def switches() -> tuple[object, ...]:
    return (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)


def test_deterministic_or_not() -> None:
    before = switches()
    with arithmetic(deterministic=False):
        assert switches() == (*before[:3], False) and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    with arithmetic(deterministic=True):
        assert switches() == (True, False, False, False)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == CUBLAS_WORKSPACE
    assert switches() == before


def test_they_are_put_back_after_an_error_too() -> None:
    before = switches()
    with pytest.raises(ValueError), arithmetic(deterministic=True):
        raise ValueError
    assert switches() == before


def test_the_users_own_workspace_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with arithmetic(deterministic=True):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
