"""`config.json` and `generation_config.json`: our model section in Hugging Face's words, and back.

Several classes of `transformers` compute what `engine.model` computes: a row of `FAMILIES` each (`families`).  What a
file leaves out has the value that `transformers` gives it, and what would compute something else is refused by name: a
setting that is passed over in silence is a model that is quietly wrong.

A model with a score for its head (a reward model) is the class `…ForSequenceClassification` of the same family, with
one label.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from checkpoints_tools.families import FAMILIES, Family, family_of
from checkpoints_tools.hf_values import Settings
from engine.config import ModelConfig
from engine.config.model import OF_ROPE_TYPES
from engine.data.tokenizer import Tokenizer
from engine.errors import CheckpointError
from engine.model.rope import stretched_base
from engine.reading import read_object, shown

Json = dict[str, Any]

CONFIG, GENERATION = "config.json", "generation_config.json"
WITH_HEAD = {"language_model": "ForCausalLM", "score": "ForSequenceClassification"}       # how their classes' names end
ONE_LABEL: Json = {"id2label": {"0": "score"}, "label2id": {"score": 0}}
LAYER_KINDS = frozenset({"full_attention", "sliding_attention"})
# What each kind of scaling has in our section and, where it is called otherwise, in theirs; `ntk` is another base.
OF_ROPE = {kind: ("factor", *needed, *optional) for kind, (needed, optional) in OF_ROPE_TYPES.items() if kind != "ntk"}
ROPE_NAMES = {"original_max_seq_len": "original_max_position_embeddings"}
KNOWN_ROPE_KEYS = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})

# A setting of any class, what is true of it where Octant computes something else, and why that is refused.
REFUSED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("quantization_config", bool, "weights are read as they are trained"),
    ("transformers_weights", bool, "weights are read from the files of the usual names"),
)


def hf_config(config: ModelConfig, dtype: str, special_ids: Json) -> Json:
    """`config.json`; `dtype` as in `float32`."""
    family = family_of(config)
    theta, scaling = _their_rope(config)
    common = {
        "hidden_size": config.hidden_size, "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers, "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim,
        "vocab_size": config.vocab_size, "max_position_embeddings": _max_position_embeddings(config),
        "rope_theta": theta, "rope_scaling": scaling, "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings, "hidden_act": family.hidden_act(config), "attention_dropout": 0.0,
        **({"partial_rotary_factor": config.rope_share} if family.partial_rotary else {}),
        **({"sliding_window": config.window} if family.window == "all" else {}),
        **(_their_windows(config) if family.window == "pattern" else {}),
        **{theirs: getattr(config, ours) for ours, theirs in family.numbers.items()}}
    return {
        "architectures": [architecture_of(family.name, config.head)], "model_type": family.model_type,
        **family.in_its_words(common), "initializer_range": 0.02, "use_cache": True, **family.written,
        **family.required,
        **{flag: getattr(config, flag) for flag in family.flags}, **special_ids,
        **(ONE_LABEL if config.head == "score" else {}), "torch_dtype": dtype}


def _their_windows(config: ModelConfig) -> Json:
    """Of a model whose every so-manyth layer sees everything."""
    kinds = ["full_attention" if config.window_of(layer) is None else "sliding_attention"
             for layer in range(config.num_layers)]
    return {"sliding_window": config.window or config.max_seq_len, "layer_types": kinds}


def _max_position_embeddings(config: ModelConfig) -> int:
    """The longest sequence; where RoPE is dynamic, the one beyond which it is stretched: there is no longest one."""
    scaling = config.rope_scaling
    if scaling is None or scaling.type != "dynamic":
        return config.max_seq_len
    assert scaling.original_max_seq_len
    return scaling.original_max_seq_len


def _their_rope(config: ModelConfig) -> tuple[float, Json | None]:
    """Base and scaling."""
    scaling = config.rope_scaling
    if scaling is None:
        return config.rope_theta, None
    if scaling.type == "ntk":
        return float(stretched_base(config)), None
    stated = {ROPE_NAMES.get(key, key): getattr(scaling, key) for key in OF_ROPE[scaling.type]}
    if scaling.type == "dynamic":                            # it is `max_position_embeddings`
        del stated[ROPE_NAMES["original_max_seq_len"]]
    return config.rope_theta, {"rope_type": scaling.type} | {key: x for key, x in stated.items() if x is not None}


def architecture_of(family: str, head: str) -> str:
    """The class of a family, which is named after the one for language models, with another head."""
    return family if head == "language_model" else family.removesuffix(WITH_HEAD["language_model"]) + WITH_HEAD[head]


def special_ids(tokenizer: Tokenizer | None, end_ids: Sequence[int]) -> Json:
    """`bos_token_id` and so on; null where there is none, or `transformers` would put in Llama's.

    Args:
        end_ids: where the model ends a text; empty: at the tokenizer's end of document.
    """
    end: Any = end_ids[0] if len(end_ids) == 1 else list(end_ids) or None
    if tokenizer is None:
        return {"bos_token_id": None, "eos_token_id": end, "pad_token_id": None}
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eod_id if end is None else end,
            "pad_token_id": tokenizer.pad_id}


def generation_config(special_ids: Json) -> Json:
    """`generation_config.json`: where generation ends; everything else is the user's choice."""
    return {"_from_model_config": True, **{key: value for key, value in special_ids.items() if value is not None}}


def read_hf_config(folder: Path) -> tuple[Family, ModelConfig]:
    """The family and our model section of a Hugging Face folder.

    Raises:
        CheckpointError: there is no `config.json`, or Octant's model would compute something else.
    """
    path = folder / CONFIG
    found = Settings(path, read_object(path, "the configuration of a model", CheckpointError))
    family = _family(found)
    stated = {family.aliases.get(key, key): value for key, value in found.values.items()}
    found = Settings(path, stated).over({**dict.fromkeys(family.flags, False), **family.defaults}, family.keys)
    mine = ("hidden_act", lambda value: not isinstance(value, str) or value not in family.mlps,
            f"a {family.name} may have {', '.join(family.mlps)}")
    found = _one_rope(found, family)
    for key, differs, why in (*REFUSED, mine):
        if differs(found.get(key)):
            raise found.refuse(key, f"which Octant's model does not have: {why}")
    for key, other in family.equal.items():
        if found.get(key) not in (None, found.get(other)):
            raise found.refuse(key, f"which Octant's model does not have: it is the same as {other}")
    for key, value in family.required.items():
        if found.get(key) != value and not (found.get(key) is None and value is False):
            raise found.refuse(key, f"which Octant's model does not have: it computes {key}: {str(value).lower()}")
    try:
        config = ModelConfig.model_validate(_model_section(found, family) | _head(found))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise CheckpointError(f"{path} describes no model that Octant has: {problems}") from None
    _require_whole_attention(found, family, config)
    pad = found.get("pad_token_id")
    if pad is not None and (type(pad) is not int or not -config.vocab_size <= pad < config.vocab_size):
        raise found.refuse("pad_token_id", f"which is outside the vocabulary of {config.vocab_size:,} ids")
    return family, config


def read_end_ids(folder: Path, config: ModelConfig) -> list[int]:
    """The ids at which `transformers` ends a text of this model: those of `generation_config.json`, if it is there.

    Raises:
        CheckpointError: the file is damaged, or an id is outside the vocabulary.
    """
    path = folder / GENERATION if (folder / GENERATION).exists() else folder / CONFIG
    found = Settings(path, read_object(path, "settings of a model", CheckpointError))
    return found.token_ids("eos_token_id", config.vocab_size)


def _family(found: Settings) -> Family:
    """The class that `transformers` would make: by `model_type`, which `architectures` may confirm."""
    names, model_type = found.get("architectures"), found.get("model_type")
    known = next((family for family in FAMILIES.values() if family.model_type == model_type), None)
    if not names and known is not None:
        return known
    name = names[0] if isinstance(names, list) and len(names) == 1 and isinstance(names[0], str) else None
    if name is not None and name.endswith(WITH_HEAD["score"]):
        name = name.removesuffix(WITH_HEAD["score"]) + WITH_HEAD["language_model"]
    if name not in FAMILIES:
        raise found.refuse("architectures", f"and model_type {shown(model_type)}; Octant converts "
                           f"{', '.join(FAMILIES)}")
    if model_type is not None and FAMILIES[name] is not known:
        raise found.refuse("architectures", f"but model_type {shown(model_type)}, which is another model")
    return FAMILIES[name]


def _model_section(found: Settings, family: Family) -> Json:
    heads, hidden = found.count("num_attention_heads"), found.count("hidden_size")
    theta, scaling, share = _rope(found, family)
    longest = _max_seq_len(found, scaling)
    section = {
        "num_layers": found.count("num_hidden_layers"), "hidden_size": hidden, "num_heads": heads,
        "num_kv_heads": found.count_or("num_key_value_heads", heads),
        "head_dim": found.count_or("head_dim", hidden // heads),
        "ffn_hidden_size": found.count_or("intermediate_size", 4 * hidden), "vocab_size": found.count("vocab_size"),
        "max_seq_len": longest, "rope_theta": theta, "rope_scaling": scaling,
        "rope_share": share, "norm_eps": found.number("rms_norm_eps"),
        "tie_embeddings": found.flag("tie_word_embeddings"),
        "mlp": family.mlps[found.get("hidden_act")], "window": _window(found, family, longest),
        **{ours: None if found.get(theirs) is None else found.number(theirs)
           for ours, theirs in family.numbers.items()},
        **(_pattern(found, family) if family.window == "pattern" else {}),
        **family.always, **{flag: found.flag(flag) for flag in family.flags}}
    return section | family.derived(section)


def _max_seq_len(found: Settings, scaling: Json | None) -> int:
    """The longest sequence; where RoPE is dynamic, `factor` times the one up to which it is plain."""
    longest = found.count("max_position_embeddings")
    return max(longest, int(longest * scaling["factor"])) if scaling and scaling["type"] == "dynamic" else longest


def _head(found: Settings) -> Json:
    """What of our model section follows from the class's head."""
    names = found.get("architectures")
    if not names or not str(names[0]).endswith(WITH_HEAD["score"]):
        return {}
    labels = found.section("id2label")
    if labels is None or len(labels.values) != 1:
        raise found.refuse("id2label", "and a model whose head is a score has one label")
    return {"head": "score", "tie_embeddings": False}


def _one_rope(found: Settings, family: Family) -> Settings:
    """Where newer files have RoPE by the kind of layer, what the older ones of the same class have.

    Raises:
        CheckpointError: layers with a window have it scaled.
    """
    local = family.numbers.get("rope_local_theta")
    rope = found.section("rope_parameters")
    if local is None or rope is None or not set(rope.values) <= LAYER_KINDS:
        return found
    full, near = (rope.section(kind) for kind in ("full_attention", "sliding_attention"))
    if near is not None and near.values.get("rope_type", "default") != "default":
        raise found.refuse("rope_parameters", "and Octant scales RoPE in layers without a window only")
    theta = {} if near is None or near.get("rope_theta") is None else {local: near.number("rope_theta")}
    return Settings(found.path, {**found.values, "rope_parameters": None if full is None else full.values, **theta},
                    found.names)


def _rope(found: Settings, family: Family) -> tuple[float, Json | None, float]:
    """Base, scaling, and the share of each head that turns.

    Newer files put both into `rope_parameters`; older ones have `rope_theta` beside `rope_scaling`, in which
    `rope_type` may be called `type`.  Where both objects are given, which one counts depends on the version.
    """
    sections = [section for key in ("rope_scaling", "rope_parameters") if (section := found.section(key)) is not None]
    if len(sections) == 2 and sections[0].values != sections[1].values:
        raise found.refuse("rope_scaling", f"and rope_parameters {shown(found.get('rope_parameters'))}: versions of "
                           "transformers differ in which of the two counts; remove the wrong one")
    stated = sections[0].values if sections else {}
    beside = {key: found.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    rope = Settings(found.path, {**beside, **stated}, found.names)
    theta, kind = rope.number("rope_theta"), stated.get("rope_type", stated.get("type", "default"))
    share = 1.0 if rope.get("partial_rotary_factor") is None else rope.number("partial_rotary_factor")
    if share > 1 or (share < 1 and not family.partial_rotary):
        raise rope.refuse("partial_rotary_factor", f"and RoPE turns whole heads in a {family.name}")
    plain = kind == "default" or (kind == "linear" and rope.number("factor") == 1)
    if not plain and kind not in OF_ROPE:
        raise CheckpointError(f"{found.path}: rope_scaling: RoPE is of the kind {shown(kind)} "
                              f"({shown(dict(rope.values))}); Octant has the plain kind, {', '.join(OF_ROPE)}")
    known = {ROPE_NAMES.get(key, key) for keys in OF_ROPE.values() for key in keys}
    if unknown := rope.values.keys() - KNOWN_ROPE_KEYS - known:
        raise CheckpointError(f"{found.path}: RoPE has the setting {shown(min(unknown))} ({shown(dict(rope.values))}), "
                              "which Octant's model does not have")
    return theta, None if plain else _our_scaling(found, rope, kind), share


def _our_scaling(found: Settings, rope: Settings, kind: str) -> Json:
    """Of a kind that is in `OF_ROPE`."""
    needed, optional = OF_ROPE_TYPES[kind]
    whole = ROPE_NAMES["original_max_seq_len"]
    if found.get(whole) is not None or rope.get(whole) is None:         # beside the section, it counts more than in it
        rope = Settings(found.path, {**rope.values, whole: found.get(whole) or found.get("max_position_embeddings")})
    if kind == "dynamic" and rope.count(whole) != (longest := found.count("max_position_embeddings")):
        raise CheckpointError(f"{found.path}: {whole} is {rope.count(whole)} and max_position_embeddings {longest}, "
                              "beyond which transformers stretches RoPE of the kind 'dynamic'; make them the same")
    section: Json = {"type": kind, "factor": rope.number("factor")}
    if "original_max_seq_len" in needed:
        section["original_max_seq_len"] = rope.count(whole)
    for key in (*needed, *optional):
        if key not in section and (key in needed or rope.get(key) is not None):
            section[key] = rope.number(key)
    return section


def _window(found: Settings, family: Family, longest: int) -> int | None:
    """How far every layer looks back, where that is shorter than the longest sequence."""
    if family.window != "all" or found.get("sliding_window") is None:
        return None
    window = found.count("sliding_window")
    return window if window < longest else None


def _pattern(found: Settings, family: Family) -> Json:
    """The window, and which layers have none: every so-manyth, in one of three ways to say it."""
    layers = found.count("num_hidden_layers")
    every = found.count_or("sliding_window_pattern", found.count_or("_sliding_window_pattern", family.full_every))
    kinds = found.get("layer_types")
    if kinds is None:
        kinds = ["full_attention" if (layer + 1) % every == 0 else "sliding_attention" for layer in range(layers)]
    if found.get("sliding_window") is None or kinds == ["full_attention"] * layers:
        return {"window": None, "rope_local_theta": None}
    window = found.count("sliding_window")
    every = kinds.index("full_attention") + 1 if isinstance(kinds, list) and "full_attention" in kinds else 0
    wanted = ["full_attention" if every and (layer + 1) % every == 0 else "sliding_attention"
              for layer in range(layers)]
    if kinds != wanted:
        raise found.refuse("layer_types", f"which is not full_attention in every so-manyth of the {layers} layers and "
                           "sliding_attention in the others")
    return {"window": window, "full_every": every}


def _require_whole_attention(found: Settings, family: Family, config: ModelConfig) -> None:
    """
    Raises:
        CheckpointError: some layers look back through a window shorter than the longest sequence.
    """
    kinds = _layer_kinds(found, config.num_layers) if family.window == "layer_types" else ()
    if "sliding_attention" in kinds and found.get("sliding_window") is not None and \
            found.count("sliding_window") < config.max_seq_len:
        raise found.refuse("sliding_window", "in layers chosen in a way that Octant's model does not have.  Up to the "
                           "window both are the same: with max_position_embeddings in config.json lowered to it, the "
                           "model converts")


def _layer_kinds(found: Settings, num_layers: int) -> set[str]:
    stated, windowed = found.get("layer_types"), found.flag("use_sliding_window")
    if stated is None:
        return {"sliding_attention"} if windowed and found.count("max_window_layers", 0) < num_layers else set()
    if not isinstance(stated, list) or len(stated) != num_layers or not set(map(str, stated)) <= LAYER_KINDS:
        raise found.refuse("layer_types", f"which is not one of {', '.join(sorted(LAYER_KINDS))} for each of the "
                           f"{num_layers} layers")
    if "sliding_attention" in stated and not windowed:
        raise found.refuse("layer_types", "which has windows that use_sliding_window turns off")
    return set(stated)
