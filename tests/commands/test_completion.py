"""The completion script is bash that completes verbs, their options and files."""

from __future__ import annotations

import subprocess
import sys

import pytest

from engine import cli

pytest.importorskip("shtab")


def completed(script: str, *words: str) -> list[str]:
    """What bash offers for the last of these words."""
    line = " ".join(words)
    asked = f"COMP_WORDS=({line} ''); COMP_CWORD={len(words)}; COMP_LINE='{line} '; COMP_POINT={len(line) + 1}"
    code = f"{script}\n{asked}\n_shtab_octant octant ''; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_bash_completes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert {verb.name for verb in cli.VERBS} <= set(completed(script, "octant"))
    assert {"clean", "inspect", "verify"} <= set(completed(script, "octant", "data"))
    assert "_shtab_compgen_files" in script and "--explain-rank" in script


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.run(["completion", "bash"]) == 2
    assert "pip install 'octant[completion]'" in capsys.readouterr().err
