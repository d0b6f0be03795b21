"""`octant demo` from start to end, and on what it leaves behind every command of the README."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import pytest

from engine import cli
from engine.commands import demo as command
from engine.errors import OctantError, RequestError
from tests.test_readme import octant_commands

ROOT = Path(__file__).resolve().parents[2]

# The README's block is pasted in a clone; here the clone is elsewhere, and there are fewer steps.
ELSEWHERE = {
    "configs/tiny.yaml": [str(ROOT / "configs" / "tiny.yaml"), "steps=2"],
    "configs/llama-65b.yaml": [str(ROOT / "configs" / "llama-65b.yaml")],
    "steps=120": ["steps=3"],
}


@dataclass(frozen=True)
class Demo:
    """What it printed, and the folder in which it was started; its own is `demo` in there."""

    output: str
    home: Path

    def octant(self, *arguments: str) -> str:
        """Runs a command where the demo was started; returns what it prints."""
        done = subprocess.run([sys.executable, "-m", "engine", *arguments], cwd=self.home, capture_output=True,
                              text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
        assert done.returncode == 0, f"octant {shlex.join(arguments)}\n{done.stdout}{done.stderr}"
        return done.stdout


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    home = tmp_path_factory.mktemp("home")
    return Demo(Demo("", home).octant("demo", "--dir", "demo"), home)


def test_every_command_it_shows_parses(demo: Demo) -> None:
    shown = re.findall(r"^\$ octant ((?:'[^']*'|[^'\n])*)$", demo.output, re.MULTILINE)
    verbs = [cli.build_parser().parse_args(shlex.split(line)).verb for line in shown]
    assert verbs == ["tokenizer", "prepare", "prepare", "train", "train", "convert", "generate", "report"]


def test_the_model_learns_in_tensor_2_pipeline_2(demo: Demo) -> None:
    assert "4 processes: tensor 2 × pipeline 2 × context 1 × data 1" in demo.output
    [(first, last)] = re.findall(r"^demo: tensor 2 × pipeline 2, loss ([\d.]+) → ([\d.]+) in 160 steps", demo.output,
                                 re.MULTILINE)
    assert 7.4 < float(first) < 8.0                                    # ln 2048 = 7.62: it knows nothing
    assert float(last) < float(first) - 2.5


def test_resuming_is_exact(demo: Demo) -> None:
    assert "resumed from step 120: loss and gradient norm of 40 steps equal the run's, bit for bit" in demo.output


def test_the_export_has_the_same_logits_and_loads(demo: Demo) -> None:
    [(largest, allowed)] = re.findall(r"largest difference (\S+) \(allowed: (\S+)\)", demo.output)
    assert 0 < float(largest) <= float(allowed) < 1e-3
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(demo.home / "demo" / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo.home / "demo" / "hf")
    prompt = tokenizer(command.PROMPT, return_tensors="pt", add_special_tokens=False)
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=4, do_sample=False)[0])
    greedy = demo.octant("generate", "demo/run", "--prompt", command.PROMPT, "--max-new-tokens", "4", "--temperature",
                         "0")
    assert text.startswith(command.PROMPT) and greedy == text + "\n"


def test_it_shows_a_sample_and_the_next_command(demo: Demo) -> None:
    sample = demo.output.partition("--temperature 0.7\n")[2].partition("\n$ octant report")[0]
    assert sample.startswith(command.PROMPT) and len(sample) > len(command.PROMPT) + 60
    next_command = demo.output.splitlines()[-1].removeprefix("next: octant ").partition("   ")[0]
    assert demo.output.splitlines()[-1].startswith("next: octant train demo/demo.yaml steps=320")
    assert cli.build_parser().parse_args(shlex.split(next_command)).verb == "train"


def test_everything_it_wrote_can_be_looked_at(demo: Demo) -> None:
    listed = demo.octant("checkpoint", "list", "demo/run")
    assert "step-00000120" in listed and "step-00000160" in listed
    demo.octant("checkpoint", "verify", "demo/run/checkpoints/step-00000160")
    scores = json.loads(demo.octant("eval", "demo/run", "--data", "demo/valid", "--batches", "4", "--json"))
    assert 3 < scores["loss"] < 6 and 1 < scores["bits_per_byte"] < 4
    assert "tokens" in demo.octant("data", "inspect", "demo/train")
    samples = demo.octant("data", "inspect", "demo/demo.yaml", "--samples", "0:2", "--json").splitlines()
    assert [len(json.loads(sample)["tokens"]) for sample in samples] == [129, 129]
    demo.octant("data", "verify", "demo/train", "demo/valid")
    page = (demo.home / "demo" / "run" / "report.html").read_text()
    assert page.count("<svg") + page.count("<img") >= 5


def test_the_commands_of_the_readme_run_one_after_the_other(demo: Demo) -> None:
    for words in octant_commands():
        if words[0] != "demo":                                         # that is what has just run
            demo.octant(*(part for word in words for part in ELSEWHERE.get(word, [word])))
    assert (demo.home / "out" / "config.json").is_file() and (demo.home / "runs" / "tiny" / "report.html").is_file()


def test_another_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RequestError, match="is not empty and no earlier demo; give another folder with --dir"):
        command.run(Namespace(what="pretrain", dir=str(tmp_path), processes=1))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_first_failure_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                   capfd: pytest.CaptureFixture[str]) -> None:
    """And the next attempt in the same folder begins anew."""
    monkeypatch.setattr(command, "VOCAB_SIZE", 3)
    monkeypatch.setattr(command, "CORPUS_BYTES", 10_000)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for start in ("text: ", "replacing the earlier demo"):
        with pytest.raises(OctantError, match="`octant tokenizer train` ended with exit code 2; its message is above"):
            command.run(Namespace(what="pretrain", dir=str(tmp_path / "demo"), processes=1))
        output = capfd.readouterr()
        assert output.out.startswith(start) and "octant tokenizer: " in output.err
