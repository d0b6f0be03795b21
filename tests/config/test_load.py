"""Files, bases, overrides and presets become one resolved configuration, or one message with everything wrong in it."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from engine.config import Config, DataConfig, ModelConfig, load_config
from engine.errors import ConfigError

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
    path = write(tmp_path, "a.yaml", MODEL + f"steps: 10\noptim: {{lr: {text}, min_lr: 0}}")
    assert load_config(path).optim.lr == value
    assert load_config(path, [f"optim.lr={text}"]).optim.lr == value


@given(st.floats(min_value=1e-300, max_value=1e300))
def test_every_float_that_python_prints_is_read_back(tmp_path_factory: pytest.TempPathFactory, number: float) -> None:
    text = MODEL + f"steps: 1\noptim: {{lr: {number!r}, min_lr: 0}}"
    path = write(tmp_path_factory.getbasetemp(), "float.yaml", text)
    assert load_config(path).optim.lr == number


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
                     f"batch.micro: must be greater than or equal to 1 (it is 0)  [{path}:4]",
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
    ("steps: 1\nparallel: {data: auot}", "parallel.data: must be a number of at least 1, or `auto`; it is 'auot'"),
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
