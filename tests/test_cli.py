"""The command line: help without torch, mistakes with a hint and exit code 2, errors without a traceback."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from engine import cli
from engine.errors import CheckpointError, WorkerError

ROOT = Path(__file__).resolve().parents[1]


def python(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False)


def test_help_imports_nothing_heavy() -> None:
    done = python("-c", "import sys\nfrom engine.cli import run\ntry: run(['--help'])\nexcept SystemExit: pass\n"
                  "print(sorted({'torch', 'numpy', 'pydantic', 'rich', 'yaml'} & sys.modules.keys()), file=sys.stderr)")
    assert done.stderr == "[]\n"
    for verb in cli.VERBS:
        assert re.search(rf"^ +{verb.name} +\S", done.stdout, re.MULTILINE)


def test_python_m_engine_is_the_same_command() -> None:
    assert python("-m", "engine", "--version").stdout.startswith("octant ")


@pytest.mark.parametrize("verb", cli.VERBS, ids=lambda verb: verb.name)
def test_every_verb_has_a_module_and_an_example_that_parses(verb: cli.Verb) -> None:
    assert find_spec(f"engine.commands.{verb.name}"), f"delete the row of `{verb.name}`: it has no module"
    assert cli.build_parser().parse_args(shlex.split(verb.example)).verb == verb.name


def test_every_module_has_a_verb() -> None:
    modules = {path.stem for path in (ROOT / "engine" / "commands").glob("*.py")} - {"__init__"}
    assert {name for name in modules if not name.startswith("_")} <= {verb.name for verb in cli.VERBS}


@pytest.mark.parametrize(("arguments", "expected"), [
    (["trian"], "unknown: 'trian'; did you mean `train`?"),
    (["zzz"], "unknown: 'zzz'; known: demo, tokenizer"),
    (["data", "inspec"], "did you mean `inspect`?"),
    (["schedule", "1f1", "--stages", "2", "--microbatches", "4"], "did you mean `1f1b`?"),
    (["train"], "the following arguments are required: CONFIG.yaml"),
    (["train", "--steps", "1", "a.yaml"], "unknown option --steps; configuration keys are written key=value: steps=1"),
    (["train", "a.yaml", "--lr=3e-4"], "key=value: optim.lr=3e-4"),
    (["train", "a.yaml", "--tensor-model-parallel-size", "2"], "key=value: parallel.tensor=2"),
    (["train", "a.yaml", "--bf16"], "key=value: precision.compute=…"),
    (["plan", "--config", "a.yaml"], "the configuration is given as it is: octant plan a.yaml"),
    (["prepare", "--tokeniser", "bytes", "a.txt"], "unknown option --tokeniser; did you mean --tokenizer?"),
])
def test_mistakes_get_a_hint(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.run(arguments)
    assert caught.value.code == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "expected"), [
    ("plan --gpus 8 a.yaml parallel.zero=3 --explain-rank 7 steps=1",
     {"gpus": "8", "explain_rank": 7, "config": "a.yaml", "overrides": ["parallel.zero=3", "steps=1"]}),
    ("prepare --workers 2 a.txt --tokenizer bytes b.txt --output=x", {"workers": 2, "files": ["a.txt", "b.txt"]}),
    ("data clean --decontaminate e.jsonl f.jsonl --output o a.txt", {"decontaminate": ["e.jsonl", "f.jsonl"],
                                                                     "files": ["a.txt"]}),
    ("generate --prompt -x -- -run", {"prompt": ["-x"], "checkpoint": "-run"}),
    ("schedule --stages 2 zb-v --microbatches 4", {"name": "zb-v", "stages": 2}),
    ("bench matmul --sizes 4 --help", {"rest": ["--sizes", "4", "--help"]}),
])
def test_options_may_stand_anywhere(arguments: str, expected: dict[str, object]) -> None:
    parsed = vars(cli.build_parser().parse_args(arguments.split()))
    assert {name: parsed[name] for name in expected} == expected


def test_alone_and_help_explain_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([]) == 2
    said = capsys.readouterr().err
    assert "octant demo" in said and "train" in said and said.endswith("octant: say what to do: octant VERB …\n")
    for words, shown in ((["help"], "usage: octant VERB"), (["help", "train"], "usage: octant train"),
                         (["help", "data", "clean"], "usage: octant data clean")):
        with pytest.raises(SystemExit) as caught:
            cli.run(words)
        assert caught.value.code == 0 and shown in capsys.readouterr().out


@pytest.mark.parametrize(("error", "code", "message"), [
    (CheckpointError("no checkpoint in x"), 2, "octant doctor: no checkpoint in x\n"),
    (WorkerError("rank 3 died"), 1, "octant doctor: rank 3 died\n"),
    (KeyboardInterrupt(), 1, "octant doctor: interrupted\n"),
])
def test_errors_are_one_message(error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str],
                                monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> int:
        raise error

    monkeypatch.setattr("engine.commands.doctor.run", fail)
    assert cli.run(["doctor"]) == code
    assert capsys.readouterr().err == message


def test_a_command_can_be_started_again_with_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["generate", "--prompt=--x\n", "--prompt", "a b", "--tensor=2", "--", "-run"]
    found: list[list[str]] = []
    monkeypatch.setattr("engine.commands.generate.run", lambda args: found.append(args.argv) or 0)
    assert cli.run(words) == 0
    monkeypatch.setattr(sys, "argv", ["octant", *words])
    assert cli.run() == 0
    assert found == [words, words]


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.commands.doctor.run", lambda _: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        cli.run(["doctor"])


def test_usr2_shows_where_a_process_stands() -> None:
    script = ("import sys, time, types\nfrom engine import cli\n"
              "def stuck(_): print('ready', flush=True); time.sleep(60)\n"
              "sys.modules['engine.commands.doctor'] = types.SimpleNamespace(run=stuck)\ncli.main(['doctor'])")
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR2)
    lines = [process.stderr.readline() for _ in range(2)]
    assert process.poll() is None
    process.kill()
    process.communicate()
    assert "(most recent call first)" in lines[0] and "in stuck" in lines[1]


def test_a_closed_pipe_is_no_drama() -> None:
    script = f"set -o pipefail; '{sys.executable}' -m engine doctor | true"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")


def test_commands_print_no_traceback_for_a_wrong_request() -> None:
    done = python("-m", "engine", "train", "nowhere.yaml")
    assert done.returncode == 2
    assert done.stderr.startswith("octant train: cannot read the configuration nowhere.yaml")
    assert "Traceback" not in done.stderr
