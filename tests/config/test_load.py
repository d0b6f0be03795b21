"""Files, bases, overrides and presets become one resolved configuration, or one message with everything wrong in it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import sentencepiece
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from engine.config import Config, DataConfig, ModelConfig, config_names, load_config
from engine.config.yaml_values import dump_yaml, parse_yaml
from engine.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
MODEL = "model: {num_layers: 2, hidden_size: 64, num_heads: 4, ffn_hidden_size: 96, vocab_size: 300}\n"


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def problem(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_defaults_follow_from_what_is_given(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "a.yaml", MODEL + "steps: 10\noptim: {lr: 3e-4}\nbatch: {micro: 2}"))
    assert (config.model.num_kv_heads, config.model.head_dim) == (4, 16)
    assert (config.optim.lr, config.optim.min_lr) == (3e-4, 3e-5)
    assert config.batch.global_ == 2
    assert (config.parallel.tensor, config.parallel.data) == (1, "auto")


@pytest.mark.parametrize(("text", "value"), [
    ("3e-4", 3e-4), ("1E3", 1000.0), ("5", 5.0), ("1_000.5", 1000.5), (".5", 0.5), ("2.", 2.0), ("+1e+2", 100.0)])
def test_numbers(tmp_path: Path, text: str, value: float) -> None:
    path = write(tmp_path, "a.yaml", MODEL + f"steps: 10\noptim: {{grad_clip: {text}}}")
    assert load_config(path).optim.grad_clip == value
    assert load_config(path, [f"optim.grad_clip={text}"]).optim.grad_clip == value


@given(st.floats(allow_nan=False))
def test_every_float_that_python_prints_is_read_back(number: float) -> None:
    for text in (repr(number), dump_yaml(number)):
        assert float(parse_yaml(text, "a float")[0]) == number


@given(st.text())
def test_every_word_is_written_as_a_word(word: str) -> None:
    assert parse_yaml(dump_yaml({"a": word}), "a word")[0] == {"a": word}


def test_words_stay_words(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", MODEL + "steps: 10\nprecision: {fp8: off}\nrun: {name: no, dir: 2024-01-01}")
    config = load_config(path)
    assert (config.precision.fp8, config.run.name, config.run.dir) == ("off", "no", "2024-01-01")


def test_bases_are_relative_to_the_file_and_merge_key_by_key(tmp_path: Path) -> None:
    write(tmp_path, "root.yaml",
          MODEL + "steps: 10\ndata: {train: [{path: a}, {path: b}]}\noptim: {lr: 1e-3, eps: 1e-6}")
    write(tmp_path, "middle/m.yaml", "base: ../root.yaml\nsteps: 20\nmodel: {num_layers: 3}")
    path = write(tmp_path, "leaf.yaml", "base: middle/m.yaml\ndata: {train: [{path: c}]}\noptim: {lr: 1e-2}")
    config = load_config(path, ["model.num_heads=2"])
    assert (config.steps, config.model.num_layers, config.model.hidden_size) == (20, 3, 64)
    assert [source.path for source in config.data.train] == ["c"]
    assert (config.optim.lr, config.optim.eps) == (1e-2, 1e-6)
    assert config.model.num_heads == 2


def test_configurations_that_come_along_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever one is; a file of the same name is what is meant."""
    monkeypatch.chdir(tmp_path)
    for name in config_names():
        assert load_config(name) == load_config(ROOT / "configs" / f"{name}.yaml")
    write(tmp_path, "mine.yaml", "base: llama-7b\nsteps: 7")
    assert load_config("mine.yaml") == load_config("llama-7b", ["steps=7"])
    assert "did you mean llama-7b?" in problem(Path("lama-7b"))
    assert "did you mean tiny?" in problem(Path("configs/tiny.yaml"))
    write(tmp_path, "llama-7b", "base: llama-65b\nsteps: 7")
    assert load_config("llama-7b").model == load_config("mine.yaml", ["steps=1"]).model != load_config("tiny").model


def test_a_circle_of_bases_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "base: b.yaml")
    path = write(tmp_path, "b.yaml", "base: a.yaml")
    assert "circle" in problem(path)


def test_overrides_are_yaml(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", MODEL + "steps: 10")
    config = load_config(path, ["data.train=[{path: x, weight: 2}, {path: y}]", "optim.betas=[0.8, 0.9]", "steps=1e3",
                                "data.tokenizer=null", "checkpoint.async=false", "run.dir=a=b", "data.skip=[[3, 5]]"])
    assert [(s.path, s.weight) for s in config.data.train] == [("x", 2.0), ("y", 1.0)]
    assert config.optim.betas == (0.8, 0.9)
    assert (config.steps, config.checkpoint.async_, config.run.dir, config.data.skip) == (1000, False, "a=b", ((3, 5),))


@pytest.mark.parametrize("override", ["steps", "=3", "optim..lr=1", "optim.lr=[1"])
def test_malformed_overrides(tmp_path: Path, override: str) -> None:
    assert "override" in problem(write(tmp_path, "a.yaml", MODEL + "steps: 10"), override)


def test_every_problem_is_listed_with_its_place(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", "optim:\n  lrr: 1e-3\n")
    path = write(tmp_path, "a.yaml", "base: base.yaml\n" + MODEL + "stpes: 10\nbatch: {micro: 0}\nrun: 5\n"
                 "data:\n  train:\n    - {path: x, wieght: 2}\n")
    text = problem(path, "parallel.tensro=2", "parallel.schedule=1f2b")
    for expected in (f"optim.lrr: unknown key; did you mean `lr`?  [{tmp_path}/base.yaml:2]",
                     f"stpes: unknown key; did you mean `steps`?  [{path}:3]",
                     "steps: is missing",
                     f"batch.micro: must be at least 1 (it is 0)  [{path}:4]",
                     f"run: must be a mapping, not 5  [{path}:5]",
                     f"data.train.0.wieght: unknown key; did you mean `weight`?  [{path}:8]",
                     "parallel.tensro: unknown key; did you mean `tensor`?  [command line]",
                     "parallel.schedule: no schedule '1f2b'; did you mean 1f1b?"):
        assert expected in text, text
    assert text.startswith(f"{path}: 8 problems")


def test_a_far_off_key_gets_the_list(tmp_path: Path) -> None:
    assert "unknown key; known: every, batches" in problem(write(tmp_path, "a.yaml", MODEL + "steps: 1"), "eval.zzz=1")


@pytest.mark.parametrize(("text", "expected"), [
    ("steps: 1\nsteps: 2", ":3: the key `steps` is given twice"),
    ("steps: [1", "not valid YAML"),
    ("steps: true", "steps: must be a number, not true"),
    ("steps: 1\nparallel: {data: auot}", "parallel.data: must be a number from 1 to 1,000,000, or `auto`; it"),
    ("steps: 1\nbase: [a, b]", "`base:` must name one file"),
    ("steps: 1\nbase: none.yaml", "cannot read the configuration"),
    ("steps: 1\nmodel: {preset: lama-7b}", "did you mean `llama-7b`?"),
    ("steps: 1\ndata: {seq_len: 4096}", "data.seq_len(4096) > model.max_seq_len(2048)"),
    ("steps: 1\noptim: {lr: 1e-4, min_lr: 1e-3}", "optim.min_lr(0.001) > optim.lr(0.0001)"),
    ("steps: 1\noptim: {lr: .inf}", "optim.lr: must be a finite number"),
])
def test_one_clear_message(tmp_path: Path, text: str, expected: str) -> None:
    prefix = "" if "model:" in text else MODEL
    assert expected in problem(write(tmp_path, "a.yaml", prefix + text))


def test_model_shapes_that_cannot_be() -> None:
    shape = {"num_layers": 1, "hidden_size": 60, "num_heads": 4, "ffn_hidden_size": 8, "vocab_size": 9}
    with pytest.raises(ValidationError, match=r"num_heads\(4\) is not a multiple of num_kv_heads\(3\)"):
        ModelConfig.model_validate(shape | {"num_kv_heads": 3})
    with pytest.raises(ValidationError, match=r"head_dim\(15\) is odd"):
        ModelConfig.model_validate(shape)


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    assert "cannot read" in problem(tmp_path / "missing.yaml")
    assert "mapping of sections" in problem(write(tmp_path, "a.yaml", "- 1"))
    assert "model: is missing" in problem(write(tmp_path, "b.yaml", ""))


def test_what_cannot_be_read_is_said_at_once(tmp_path: Path) -> None:
    """A pipe would wait for ever, a device never end."""
    os.mkfifo(tmp_path / "pipe")
    assert "pipe: it is a pipe" in problem(tmp_path / "pipe")
    assert "/dev/zero: it is a device" in problem(Path("/dev/zero"))
    assert "it is a folder" in problem(tmp_path)
    with (tmp_path / "huge.yaml").open("wb") as file:
        file.truncate(1 << 40)
    assert "huge.yaml: it has 1,099,511,627,776 bytes, and no more than" in problem(tmp_path / "huge.yaml")
    (tmp_path / "round.yaml").symlink_to("round.yaml")
    assert "cannot read the configuration" in problem(tmp_path / "round.yaml")
    assert "cannot read the configuration a\\x00b" in problem(Path("a\0b"))
    assert "it is a pipe" in problem(write(tmp_path, "a.yaml", "base: pipe"))
    for index in range(20):
        write(tmp_path, f"{index}.yaml", f"base: {index + 1}.yaml")
    assert "`base:` leads through more than 16 files" in problem(tmp_path / "0.yaml")


@pytest.mark.parametrize(("text", "expected"), [
    ("steps: 1\nrun: {dir: \x07}", "a.yaml:3: the control character '\\x07' is not allowed"),
    ("steps: " + "9" * 5000, "a.yaml:2: a number of 5,000 digits, 99999999999999999999…"),
    ("steps: 0x" + "f" * 5000, "a.yaml:2: a number of 5,002 digits"),
    ("steps: !!python/object/apply:os.system [ls]", "a.yaml:2: the tag tag:yaml.org,2002:python/object"),
    ("steps: !!timestamp 2001-01-01", "a.yaml:2: the tag"),
    ("steps: " + "[" * 5000, "a.yaml:2: nested more than 32 levels deep"),
    ("c0: &c0 [x]\n" + "".join(f"c{i}: &c{i} [" + f"*c{i - 1}, " * 9 + "]\n" for i in range(1, 9)),
     "with its anchors the document has more than 100,000 values"),
    ("a: &a [*a]", "with its anchors the document has more than 32 levels"),
    ("? [a, b]\n: 1", "a.yaml:2: a key is a word, not a list or a mapping"),
    ("<<: [1]", "a.yaml:2: `<<` merges mappings, and this is none"),
    ("a: *nowhere", "a.yaml is not valid YAML: line 2, column 4: found undefined alias 'nowhere'"),
    ("steps: 1\noptim: {lr: 1e26}", "optim.lr: must be at most 10 (it is 1e+26)"),
    ("steps: 1\nbatch: {global: 1e26}", "batch.global: "),
    ("steps: 99999999999999999999", "steps: must be at most 1,000,000,000,000"),
    ("steps: 1\nrun: {seed: 18446744073709551616}", "run.seed: must be at most 18,446,744,073,709,551,615"),
    ("steps: 1\nrun: {dir: ''}", "run.dir: must not be empty"),
    ("steps: 1\nrun: {dir: \"a\\eb\"}", "run.dir: holds a control character: 'a\\x1bb'"),
    ("steps: 1e12\nbatch: {global: 1e9}", "= 2.0e+24 tokens, more than can be counted"),
    ("steps: 1\n" + "\n".join(f"k{i}: 1" for i in range(50)), "… and 30 more"),
])
def test_nonsense_is_refused_with_its_place(tmp_path: Path, text: str, expected: str) -> None:
    path = write(tmp_path, "a.yaml", MODEL + text)
    assert expected in problem(path)


def test_numbers_and_anchors_that_are_meant(tmp_path: Path) -> None:
    text = ("steps: 010\nrun: {seed: 18446744073709551615}\neval: &e {every: 3}\nlog: {<<: *e}\n"
            "checkpoint: {<<: [*e, *e]}")
    config = load_config(write(tmp_path, "a.yaml", MODEL + text))
    assert (config.steps, config.run.seed, config.log.every, config.checkpoint.every) == (10, 2**64 - 1, 3, 3)


@pytest.mark.parametrize(("override", "expected"), [
    ("learning_rate=3e-4", "learning_rate: unknown key; here it is `optim.lr`  [command line]"),
    ("tp=2", "here it is `parallel.tensor`"), ("micro_batch_size=4", "here it is `batch.micro`"),
    ("optim.learning-rate=1", "here it is `optim.lr`"), ("lr=1", "here it is `optim.lr`"),
    ("parallelism.tensor_parallel_degree=2", "here its `tensor_parallel_degree` is `parallel.tensor`"),
    ("train.max_norm=1", "here its `max_norm` is `optim.grad_clip`"),
    ("tensor=2", "tensor: unknown key; it is `parallel.tensor`"), ("optim.seq_len=3", "it is `data.seq_len`"),
    ("every=3", "it is `checkpoint.every` or `eval.every` or `log.every`"),
    ("resume=true", "here it is `checkpoint.resume` (auto (the newest that verifies), never, or the path of one)"),
    ("checkpoint.resume=true", "checkpoint.resume: is `auto` (the newest that verifies), `never`, or the path of a"),
    ("data.train=data/tiny", "data.train: is a list of sources: write [{path: data/tiny}] (it is 'data/tiny')"),
    ("data.train=[data/tiny]", "data.train.0: is a list of sources: write [{path: data/tiny}]"),
    ("model=llama-7b", "model: is a mapping: write {preset: llama-7b}"),
    ("log.wandb=true", "log.wandb: is the name of a project"),
])
def test_other_words_for_our_keys_are_translated(tmp_path: Path, override: str, expected: str) -> None:
    assert expected in problem(write(tmp_path, "a.yaml", MODEL + "steps: 10"), override)


def test_preset_fields_give_way_to_explicit_ones(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "steps: 1\nmodel: {preset: llama3.2-1b, num_layers: 2, rope_scaling: {factor: 8}}")
    model = load_config(path, ["model.max_seq_len=4096"]).model
    assert (model.num_layers, model.hidden_size, model.max_seq_len) == (2, 2048, 4096)
    assert model.rope_scaling is not None
    assert (model.rope_scaling.factor, model.rope_scaling.original_max_seq_len) == (8, 8192)
    assert load_config(path, ["model.rope_scaling=null"]).model.rope_scaling is None


@pytest.mark.parametrize(("model", "tokenizer", "size"), [
    ("{preset: tiny}", "bytes", 512), ("{preset: tiny, vocab_size: 300}", "bytes", 300),
    ("{num_layers: 1, hidden_size: 8, num_heads: 1, ffn_hidden_size: 8}", "bytes", 257),
    ("{preset: tiny}", "tok.json", 1201), ("{preset: llama-7b}", "tok.json", 32000),
    ("{preset: tiny}", "not/here.model", 512),
])
def test_vocabulary_size_may_come_from_the_tokenizer(tmp_path: Path, model: str, tokenizer: str, size: int) -> None:
    write(tmp_path, "tok.json", '{"model": {"vocab": {"a": 0, "b": 1199}}, "added_tokens": [{"id": 1200}]}')
    where = tokenizer if "/" in tokenizer or tokenizer == "bytes" else str(tmp_path / tokenizer)
    path = write(tmp_path, "a.yaml", f"steps: 1\nmodel: {model}\ndata: {{tokenizer: {where}}}")
    assert load_config(path).model.vocab_size == size


def test_vocabulary_size_of_sentencepiece_and_of_rubbish(tmp_path: Path) -> None:
    lines = (f"line {i} of some text that is long enough to be cut into pieces" for i in range(200))
    prefix = str(tmp_path / "tok")
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_prefix=prefix, vocab_size=60,
                                             model_type="bpe", minloglevel=2)
    shape = "{num_layers: 1, hidden_size: 8, num_heads: 1, ffn_hidden_size: 8}"
    path = write(tmp_path, "a.yaml", f"steps: 1\nmodel: {shape}\ndata: {{tokenizer: {prefix}.model}}")
    assert load_config(path).model.vocab_size == 60
    broken = write(tmp_path, "broken.json", "{}")
    assert "cannot be read as a tokenizer" in problem(path, f"data.tokenizer={broken}")
    assert "model.vocab_size: is missing" in problem(path, "data.tokenizer=null")


def test_dump_runs_again_and_values_do_not_change(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml",
                 "steps: 7\nmodel: {preset: llama3.2-1b}\ndata: {train: [{path: x}], skip: [[1, 2]]}")
    config = load_config(path, ["batch.global=8", "checkpoint.async=false", "precision.fp8=off"])
    again = load_config(write(tmp_path, "again.yaml", config.dump()))
    assert again == config == Config.model_validate(config.to_dict())
    assert "preset" not in config.dump()
    assert yaml.safe_load(config.dump()) == config.to_dict()
    with pytest.raises(ValidationError):
        config.steps = 8  # type: ignore[misc]


def test_sections_can_be_built_from_python() -> None:
    with pytest.raises(ValidationError):
        DataConfig.model_validate({"seq_length": 3})
    assert DataConfig(seq_len=16).train == ()
