"""A model named as on the Hub is fetched by huggingface_hub: here out of its cache, as without a network."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from checkpoints_tools.hub import local_folder
from engine.errors import CheckpointError

constants = pytest.importorskip("huggingface_hub.constants")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture()
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds one model, and no network."""
    model = tmp_path / "models--octant--small"
    (model / "snapshots" / COMMIT).mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    (model / "snapshots" / COMMIT / "config.json").write_text("{}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return model / "snapshots" / COMMIT


def test_a_name_leads_to_the_folder_in_the_cache(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert local_folder("octant/small").resolve() == cache.resolve()
    assert "fetching octant/small from the Hugging Face Hub" in capsys.readouterr().out


def test_a_folder_is_that_folder(cache: Path) -> None:
    (Path.cwd() / "octant" / "small").mkdir(parents=True)
    assert local_folder("octant/small") == Path("octant/small")
    assert local_folder("some/deeper/path") == Path("some/deeper/path")


def test_what_cannot_be_fetched_is_one_sentence(cache: Path) -> None:
    with pytest.raises(CheckpointError, match="octant/large: no such folder, and it cannot be fetched"):
        local_folder("octant/large")


def test_without_the_package_it_says_what_to_install(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"pip install 'octant\[hf\]'"):
        local_folder("octant/small")
