"""The package as a checkout and as a wheel, with `kernels/` installed where it shadows nobody."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from engine import __version__
from engine.commands.doctor import CORE

ROOT = Path(__file__).resolve().parents[1]
IMPORT_ALL = """
import pkgutil, importlib, sys
import checkpoints_tools, corpus_tools, engine, engine.kernels.rms_norm
print(engine.__file__)
for package in (engine, corpus_tools, checkpoints_tools):
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not found.name.endswith("__main__"):
            try:
                importlib.import_module(found.name)
            except ModuleNotFoundError as error:
                if error.name != "lm_eval":             # in no extra; its command says so
                    raise
assert "kernels" not in sys.modules
"""


def python(code: str, cwd: Path, *path: Path) -> str:
    """Output of `code`, which must succeed, with `path` in front of everything installed."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built in a copy (a build leaves folders behind), unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "tree", ignore=lambda path, names: [
        name for name in names if Path(path) == ROOT and (name.startswith(".") or name in ("build", "data", "runs"))])
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
                    "--wheel-dir", str(folder), str(folder / "tree")], check=True)
    (archive,) = folder.glob("octant-*.whl")
    zipfile.ZipFile(archive).extractall(folder / "site")
    return folder / "site"


def test_the_checkout_works_from_its_root() -> None:
    assert python(IMPORT_ALL, ROOT).strip() == str(ROOT / "engine" / "__init__.py")


def test_the_wheel_works_elsewhere(wheel: Path, tmp_path: Path) -> None:
    assert python(IMPORT_ALL, tmp_path, wheel).strip() == str(wheel / "engine" / "__init__.py")
    code = "from engine.config import preset_names; print(len(preset_names()))"
    assert int(python(code, tmp_path, wheel)) == 11
    code = "from engine.config import config_names, load_config; print(*map(load_config, config_names()), sep='\\n')"
    assert python(code, tmp_path, wheel) == python(code, ROOT) != ""


def test_what_comes_along_is_in_the_wheel(wheel: Path) -> None:
    for folder in ("configs", "launch"):
        inside = {path.name: path.read_bytes() for path in (wheel / "engine" / folder).iterdir()}
        assert inside == {path.name: path.read_bytes() for path in (ROOT / folder).iterdir()} != {}
    assert all((wheel / package / "py.typed").is_file() for package in ("engine", "checkpoints_tools", "corpus_tools"))


def test_the_wheel_names_what_it_needs(wheel: Path) -> None:
    """With a lower bound each, of packages that `octant doctor` and constraints.txt know."""
    (metadata,) = wheel.glob("octant-*.dist-info/METADATA")
    message = email.message_from_string(metadata.read_text(encoding="utf-8"))
    assert message["Version"] == __version__ and message["Requires-Python"] == ">=3.11"
    needed = [Requirement(text) for text in message.get_all("Requires-Dist", [])]
    core = {need.name for need in needed if need.marker is None}
    assert core == set(CORE)
    unbounded = {need.name for need in needed if ">=" not in str(need.specifier)}
    assert unbounded == {"types-PyYAML"}                                       # numbered after what it describes
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert not [need for need in needed if need.name in pinned and not need.specifier.contains(pinned[need.name])]


def test_the_wheel_installs_no_other_top_level_name(wheel: Path) -> None:
    names = {path.name for path in wheel.iterdir() if not path.name.endswith(".dist-info")}
    assert names <= {"engine", "checkpoints_tools", "corpus_tools"}
    assert (wheel / "engine" / "kernels" / "rms_norm.py").is_file()


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
def test_transformers_still_imports_from_the_root() -> None:
    assert python("from transformers import AutoModelForCausalLM, LlamaForCausalLM; print('ok')", ROOT) == "ok\n"
