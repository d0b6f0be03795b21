"""`octant generate` and `octant eval` as users call them."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece

from engine import cli
from engine.data.tokenizer import ByteTokenizer, load_tokenizer
from engine.errors import DataError
from engine.generate import text
from engine.generate.beams import beam_search
from engine.generate.generator import Generator, New
from engine.generate.load import load_tokenizer_of
from engine.generate.request import Limits, Sampling
from tests.kit.finished_run import STEP, make_corpus, make_run, run_config
from tests.kit.models import inference_model

ROOT = Path(__file__).resolve().parents[2]
BYTES = ByteTokenizer()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_run(tmp_path_factory.mktemp("generate"), run_config()))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_corpus(tmp_path_factory.mktemp("corpus") / "held")


def expected(prompts: Sequence[str], sampling: Sampling, num_tokens: int) -> list[list[int]]:
    generator = Generator(inference_model(run_config()))
    limits = Limits(num_tokens, [BYTES.eod_id])
    return [made.tokens for made in generator.generate([BYTES.encode(prompt) for prompt in prompts], sampling, limits)]


def octant(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "engine", *arguments], cwd=ROOT, capture_output=True, text=True,
                          check=False, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_one_prompt(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["generate", run, "--prompt", "So ein Stück", "--max-new-tokens", "12", "--temperature", "0.8",
                    "--top-k", "50", "--top-p", "0.9", "--seed", "4"]) == 0
    out, err = capsys.readouterr()
    [new] = expected(["So ein Stück"], Sampling(0.8, 50, 0.9, 4), 12)
    assert out == "So ein Stück" + BYTES.decode(new) + "\n"
    assert f"step-{STEP:08d}: {len(new)} tokens in" in err and "tokens/s" in err
    assert "next: octant checkpoint inspect" in err


def test_many_prompts_in_batches(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("second one\n\nthe third\n")
    prompts = ["first", "second one", "the third"]
    texts = expected(prompts, Sampling(seed=1), 5)
    arguments = ["generate", run, "--prompt", "first", "--prompt-file", str(tmp_path / "prompts.txt"), "--seed", "1",
                 "--max-new-tokens", "5", "--batch-size", "2"]
    assert cli.run([*arguments, "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [entry["prompt"] for entry in found] == prompts
    assert [entry["tokens"] for entry in found] == texts
    assert [entry["text"] for entry in found] == [BYTES.decode(BYTES.encode(p) + t)
                                                  for p, t in zip(prompts, texts, strict=True)]
    assert cli.run(arguments) == 0
    out = capsys.readouterr().out
    assert [out.index(f"── {i + 1} ──\n{prompt}") for i, prompt in enumerate(prompts)] == \
        sorted(out.index(prompt) - 8 for prompt in prompts)


def test_samples_stop_strings_penalty_and_beams(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*options: str) -> list[dict[str, object]]:
        assert cli.run(["generate", run, "--prompt", "one", "--prompt", "two", "--max-new-tokens", "9", "--json",
                        *options]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    sampled = said("--num-samples", "3")
    assert [(each["prompt"], each["sample"]) for each in sampled] == [(p, i) for p in ("one", "two") for i in range(3)]
    assert [each["tokens"] for each in said()] == [sampled[0]["tokens"], sampled[3]["tokens"]]
    assert len({str(each["tokens"]) for each in sampled}) == 6
    assert [each["tokens"] for each in said("--repetition-penalty", "5", "--temperature", "0")] != \
        [each["tokens"] for each in said("--temperature", "0")]
    generator = Generator(inference_model(run_config()))
    prompts = [BYTES.encode("one"), BYTES.encode("two")]
    beams = beam_search(generator, prompts, 3, Sampling(), Limits(9, [BYTES.eod_id]))
    assert [each["tokens"] for each in said("--beams", "3")] == [made.tokens for made in beams]


def test_a_stop_string_ends_a_text_with_the_token_that_completes_it() -> None:
    watch = text.StopStrings(BYTES, ["ü!", "wxyz"], BYTES.encode("ü"))
    heard = [watch(token) for token in BYTES.encode("! wxy ü z wxyzü!")]
    places = [place for place, hit in enumerate(heard) if hit]
    assert places == [len(BYTES.encode("! wxy ü z wxyz")) - 1, len(heard) - 1]


def test_an_empty_prompt_begins_a_document(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["generate", run, "--prompt", "", "--max-new-tokens", "4", "--temperature", "0", "--json"]) == 0
    generator = Generator(inference_model(run_config()))
    [new] = generator.generate([[BYTES.eod_id]], Sampling(temperature=0), Limits(4, [BYTES.eod_id]))
    assert json.loads(capsys.readouterr().out)["tokens"] == new.tokens


def test_ids_need_no_tokenizer(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = run_config().with_changes(data={"tokenizer": None})
    other = str(make_run(tmp_path / "run", config, {"data": {}}))
    assert cli.run(["generate", other, "--token-ids", "--prompt", "1 2 3", "--max-new-tokens", "5", "--temperature",
                    "0"]) == 0
    [new] = Generator(inference_model(config)).generate([[1, 2, 3]], Sampling(temperature=0), Limits(5))
    assert capsys.readouterr().out == " ".join(map(str, [1, 2, 3, *new.tokens])) + "\n"
    assert cli.run(["generate", other, "--prompt", "text"]) == 2
    assert "names no tokenizer" in capsys.readouterr().err


class Scripted:
    """Generates what it is told."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = tokens

    def stream(self, *_: object) -> Iterator[New]:
        return (New(0, token, 0.0, "") for token in self.tokens)


def test_characters_are_printed_whole_and_early(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    answer = " 你好, wörld"
    request = text.TextRequest("", ["ü"], Sampling(), 99)
    text._stream(Scripted(BYTES.encode(answer)), BYTES.encode("ü"), BYTES, request,  # type: ignore[arg-type]
                 Limits(99), written.append, text.Timer(0.0))
    assert "".join(written) == "ü" + answer + "\n"
    assert {"你", "好", "ö"} <= set(written)


def test_generate_in_a_layout_started_plainly_prints_the_same(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", run, "--prompt", "One", "--prompt=-two", "--max-new-tokens", "8", "--json"]
    done = octant(*arguments, "--tensor", "2", "--pipeline", "2")
    assert done.returncode == 0, done.stderr
    assert cli.run(arguments) == 0
    assert done.stdout == capsys.readouterr().out
    assert "tokens/s" in done.stderr


def test_eval_in_a_layout_started_plainly_prints_the_same(run: str, corpus: str,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", run, "--data", corpus, "--batches", "2", "--json"]
    done = octant(*arguments, "--pipeline", "2")
    assert done.returncode == 0, done.stderr
    assert cli.run(arguments) == 0
    here, there = json.loads(capsys.readouterr().out), json.loads(done.stdout)
    assert there["loss"] == pytest.approx(here["loss"], rel=1e-6)
    assert there["bits_per_byte"] == pytest.approx(here["bits_per_byte"], rel=1e-6)
    assert there["num_tokens"] == here["num_tokens"] == 2 * 8 * 16


def test_a_layout_that_cannot_be_is_one_message(run: str) -> None:
    done = octant("generate", run, "--prompt", "x", "--tensor", "3")
    assert done.returncode == 2
    assert done.stderr.count("octant generate:") == 1 and "num_heads(8) is not divisible" in done.stderr
    assert "Traceback" not in done.stderr and not done.stdout


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "no prompt: give --prompt"),
    (["--prompt-file", "/nowhere/prompts"], "/nowhere/prompts"),
    (["--prompt", "x" * 64], "prompt 1 has 64 tokens; with the model's maximum of 64"),
    (["--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens 0"),
    (["--prompt", "x", "--top-p", "0"], "--top-p 0.0"),
    (["--prompt", "x", "--temperature", "-1"], "--temperature -1.0"),
    (["--prompt", "x", "--batch-size", "0"], "--batch-size 0"),
    (["--prompt", "x", "--num-samples", "0"], "--num-samples 0"),
    (["--prompt", "x", "--num-samples", "2", "--temperature", "0"], "at which all texts of a prompt are the same"),
    (["--prompt", "x", "--repetition-penalty", "0"], "--repetition-penalty 0.0"),
    (["--prompt", "x", "--beams", "0"], "--beams 0"),
    (["--prompt", "x", "--beams", "2", "--stop", "y"], "goes with neither --num-samples"),
    (["--prompt", "x", "--beams", "200"], "looks at 400 continuations; there are 25"),
    (["--prompt", "x", "--stop", ""], "an empty string is in every text"),
    (["--prompt", "x", "--tensor", "0"], "parallel.tensor is 0"),
    (["--prompt", "x", "--bos"], "has no beginning-of-text id"),
    (["--prompt", "x", "--tokenizer", "/nowhere/t.model"], "--tokenizer T says where"),
    (["--prompt", "1 x", "--token-ids"], "numbers with spaces between"),
    (["--prompt", "", "--token-ids"], "numbers with spaces between"),
    (["--prompt", "1 257", "--token-ids"], "token id 257"),
    (["--prompt", "\udcff"], "not valid text"),
], ids=lambda value: " ".join(value)[:40].encode(errors="replace").decode() if isinstance(value, list) else "")
def test_wrong_requests(run: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["generate", run, *arguments]) == 2
    out, err = capsys.readouterr()
    assert message in err and err.startswith("octant generate: ") and not out


def test_no_checkpoint_and_damaged_ones(run: str, corpus: str, tmp_path: Path,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["generate", str(tmp_path), "--prompt", "x"]) == 2
    assert "no checkpoint there" in capsys.readouterr().err
    shutil.copytree(run, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.copytree(checkpoints / f"step-{STEP:08d}", checkpoints / "step-00000009")
    [shard, *_] = sorted(p for p in (checkpoints / "step-00000009").iterdir() if p.suffix != ".json")
    damaged = bytearray(shard.read_bytes())
    damaged[-1] ^= 1
    shard.write_bytes(damaged)
    for command in (["generate", str(tmp_path / "run"), "--prompt", "x"],
                    ["convert", "to-hf", str(tmp_path / "run"), str(tmp_path / "hf")],
                    ["eval", str(tmp_path / "run"), "--data", corpus]):
        assert cli.run(command) == 2
        said = capsys.readouterr().err
        assert "step-00000009: damaged" in said and f"by its own path: {checkpoints / f'step-{STEP:08d}'}" in said
    older = str(checkpoints / f"step-{STEP:08d}")
    assert cli.run(["generate", older, "--prompt", "x", "--max-new-tokens", "2"]) == 0
    assert older in capsys.readouterr().err


def test_eval(run: str, corpus: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["eval", run, "--data", corpus]) == 0
    assert "perplexity" in (out := capsys.readouterr().out) and "all windows of 16" in out
    assert cli.run(["eval", run, "--data", corpus, "--seq-len=32", "--batch-size=2", "--batches=3", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert (scores["windows"], scores["num_tokens"]) == (6, 6 * 32)
    for arguments, message in ((["--data", "/nowhere/corpus"], "/nowhere/corpus"),
                               (["--data", corpus, "--seq-len", "65"], "data.seq_len(65) > model.max_seq_len(64)"),
                               (["--data", corpus, "--batches", "0"], "--batches 0")):
        assert cli.run(["eval", run, *arguments]) == 2
        assert message in capsys.readouterr().err


def test_eval_goes_without_a_tokenizer(corpus: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", run_config().with_changes(data={"tokenizer": "gone.model"}), {"data": {}})
    assert cli.run(["eval", str(run), "--data", corpus]) == 0
    out, err = capsys.readouterr()
    assert "bits per byte n/a" in out and "tokenizer gone.model does not exist" in err


def test_the_tokenizer_is_found_where_the_run_was_started(tmp_path: Path) -> None:
    model, lines = io.BytesIO(), ["some text", "more text"] * 20
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, vocab_size=300,
                                             byte_fallback=True, model_type="bpe", minloglevel=9,
                                             hard_vocab_limit=False)
    home = tmp_path / "home"
    (home / "data").mkdir(parents=True)
    (home / "data" / "t.model").write_bytes(model.getvalue())
    sha256 = load_tokenizer(home / "data" / "t.model").sha256
    metadata = {"config": {"run": {"dir": "runs/x"}, "data": {"tokenizer": "data/t.model"}},
                "data": {"tokenizer": sha256}}
    reader = SimpleNamespace(path=home / "runs" / "x" / "checkpoints" / "step-00000001", metadata=metadata)
    assert load_tokenizer_of(reader).sha256 == sha256  # type: ignore[arg-type]
    reader.path = tmp_path / "elsewhere" / "step-00000001"
    with pytest.raises(DataError, match=r"data/t\.model does not exist"):
        load_tokenizer_of(reader)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="is not the tokenizer this model was trained with"):
        load_tokenizer_of(reader, "bytes")  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", [[], ["--tensor", "2"]], ids=["one process", "two"])
def test_a_reader_that_leaves_ends_it_quietly(run: str, tmp_path: Path, layout: list[str]) -> None:
    """As in `octant generate … | head -1`; where ranks were started, they leave no folder behind."""
    (tmp_path / "prompts").write_text("one\ntwo\n" * 100)
    arguments = ["generate", run, "--prompt-file", str(tmp_path / "prompts"), "--batch-size", "1", "--max-new-tokens",
                 "2", "--json", *layout]
    script = f"set -o pipefail; {shlex.join([sys.executable, '-m', 'engine', *arguments])} | head -1"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=False,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)})
    assert json.loads(done.stdout)["prompt"] == "one" and done.stdout.count("\n") == 1
    assert (done.returncode, done.stderr) == (1, "")
    assert [path.name for path in tmp_path.iterdir()] == ["prompts"]
