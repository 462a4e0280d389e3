"""Hostile files of models, adapters and tokenizers: nothing in them is run, and each is one clear error."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from arabic_qwen.config import DPOConfig, SFTConfig
from arabic_qwen.errors import ModelLoadError
from arabic_qwen.models.loading import load_model, load_tokenizer
from arabic_qwen.models.reference import reference_policy
from arabic_qwen.models.safety import _SIZES
from arabic_qwen.models.sources import locate_configuration, locate_model

FLOAT32 = SFTConfig(torch_dtype="float32")


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


@pytest.fixture
def marker(tmp_path):
    """A file that payloads make; it must not be there in the end."""
    path = tmp_path / "marker"
    yield path
    assert not path.exists(), "a payload was run"


@pytest.fixture
def model(model_dir, tmp_path):
    return Path(shutil.copytree(model_dir, tmp_path / "model"))


@pytest.fixture
def adapter(tmp_path, model, tiny_model):
    folder = tmp_path / "adapter"
    get_peft_model(tiny_model("qwen2"), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(
        folder
    )
    edit(folder / "adapter_config.json", base_model_name_or_path=str(model))
    return folder


def edit(file: Path, **values):
    there = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**there, **values}))


def error_of(call, *arguments, **options) -> str:
    with pytest.raises(ModelLoadError) as error:
        call(*arguments, **options)
    text = str(error.value)
    assert "\n" not in text
    return text


def load(folder, trainable=False):
    return load_model(str(folder), FLOAT32, trainable=trainable)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "plain pickle"])
@pytest.mark.parametrize("file", ["model.pt", "pytorch_model.bin", "weights.ckpt"])
def test_pickled_weights(model, marker, file, legacy):
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save({**weights, "payload": Payload(marker)}, model / file, _use_new_zipfile_serialization=not legacy)
    for call in (load, lambda folder: load_tokenizer(str(folder))):
        said = error_of(call, model)
        assert f"its weights are pickled ({file})" in said and "safetensors" in said and "convert them" in said
    assert f"{model / file}: its weights are pickled" in error_of(load, model / file)


def test_pickles_beside_safetensors_are_not_read(model, marker):
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (model / name).write_bytes(pickle.dumps(Payload(marker)))
    assert load(model)


@pytest.mark.parametrize("trainable", [False, True])
def test_pickled_adapter(adapter, marker, trainable):
    assert load(adapter, trainable)
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"payload": Payload(marker)}, adapter / "adapter_model.bin")
    assert "its weights are pickled (adapter_model.bin)" in error_of(load, adapter, trainable)


def test_pickled_reference(model, tmp_path, marker):
    policy, other = load(model), tmp_path / "other"
    other.mkdir()
    shutil.copy(model / "config.json", other)
    torch.save({"payload": Payload(marker)}, other / "pytorch_model.bin")
    config = DPOConfig(model_name=str(model), ref_model_name=str(other))
    said = error_of(reference_policy, policy, str(model), config, load_tokenizer(str(model)))
    assert "its weights are pickled (pytorch_model.bin)" in said


def test_damaged_shards_and_those_elsewhere(model, tmp_path):
    (model / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    for name in ("../elsewhere.safetensors", str(tmp_path / "elsewhere.safetensors"), "shard.bin", 7):
        edit(model / "model.safetensors.index.json", weight_map={"a": name})
        assert "weight_map must name files of its folder" in error_of(load, model)


OWN = "raise SystemExit('was run')"
REFUSED = [
    ("config.json", {"auto_map": {"AutoModelForCausalLM": "own.Own"}}, "auto_map asks for code"),
    ("config.json", {"auto_map": {"AutoConfig": "someone/else--own.Own"}}, "auto_map asks for code"),
    ("config.json", {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}, "auto_map asks for code"),
    ("config.json", {"_attn_implementation": "someone/kernel"}, "_attn_implementation names 'someone/kernel'"),
    ("config.json", {"attn_implementation": "someone/kernel:run"}, "attn_implementation names"),
    ("config.json", {"attn_implementation": {"": "paged|someone/kernel"}}, "attn_implementation names"),
    ("config.json", {"_attn_implementation_internal": ["a/b"]}, "_attn_implementation_internal names"),
    ("config.json", {"tokenizer_class": "OwnTokenizer"}, "tokenizer_class names 'OwnTokenizer'"),
    ("generation_config.json", {"custom_generate": "someone/generate"}, "custom_generate asks for code"),
    ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["own.Own", None]}}, "auto_map asks for code"),
    ("tokenizer_config.json", {"auto_map": ["own.Own", None]}, "auto_map asks for code"),
    ("tokenizer_config.json", {"tokenizer_class": "os.system"}, "tokenizer_class names 'os.system'"),
    ("tokenizer_config.json", {"tokenizer_class": "OwnTokenizer"}, "tokenizer_class names 'OwnTokenizer'"),
    ("tokenizer_config.json", {"tokenizer_class": ["a"]}, "tokenizer_class names ['a']"),
]


@pytest.mark.parametrize(("file", "values", "reason"), REFUSED)
def test_files_that_ask_for_code(model, file, values, reason):
    (model / "own.py").write_text(OWN)
    edit(model / file, **values)
    for call in (load, lambda folder: load_tokenizer(str(folder))):
        said = error_of(call, model)
        assert said.startswith(f"{model}: {file}: {reason}") and "; choose another model, or remove " in said


def test_generation_code_in_the_folder(model):
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(OWN)
    assert error_of(load, model) == (f"{model}: the folder custom_generate brings code, which is refused; remove it")


ADAPTERS = [
    ({"peft_type": "PROMPT_TUNING", "tokenizer_kwargs": {"trust_remote_code": True}}, "peft_type is 'PROMPT_TUNING'"),
    ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "megatron_config has PEFT import the module"),
    ({"auto_mapping": {"base_model_class": "A", "parent_library": "antigravity"}}, "auto_mapping names the module"),
    ({"auto_mapping": "antigravity"}, "auto_mapping names the module"),
    ({"auto_map": {"a": "b.C"}}, "auto_map asks for code"),
    ({"target_modules": r"((\w+)*)*x"}, "target_modules is no name and no simple regular"),
    ({"modules_to_save": ["(a+)+"]}, "modules_to_save is no name"),
    ({"rank_pattern": {"(a+)+": 4}}, "rank_pattern has no name"),
    ({"target_modules": ".?" * 40 + "Z"}, "target_modules is no name"),
    ({"target_modules": r"\(?" * 40 + "Z"}, "target_modules is no name"),
    ({"target_modules": "(.|.)" * 26}, "target_modules is no name"),
    ({"target_modules": "(.|.)*Z"}, "target_modules is no name"),
    ({"target_modules": "(?x:(.|.) *Z)"}, "target_modules is no name"),
    ({"rank_pattern": {"(.|.)" * 26: 4}}, "rank_pattern has no name"),
    ({"target_modules": 5}, "target_modules is no name"),
    ({"alpha_pattern": 5}, "alpha_pattern has no name"),
]


@pytest.mark.parametrize(("values", "reason"), ADAPTERS)
def test_adapters_that_ask_for_more(adapter, values, reason):
    edit(adapter / "adapter_config.json", **values)
    assert error_of(load, adapter).startswith(f"{adapter}: adapter_config.json: {reason}")


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.(q|k|v|o)_proj",
        r"model\.layers\.\d+?\.(?:self_attn|mlp)\.(?:q_proj|up_proj)",
        r"(model\.)?layers\.[01]\.self_attn\.q_proj",
    ],
)
def test_regular_expressions_that_adapters_have(adapter, pattern):
    edit(adapter / "adapter_config.json", target_modules=pattern)
    assert locate_model(str(adapter)) == str(adapter)


def test_adapter_whose_base_model_asks_for_code(adapter, model):
    edit(model / "config.json", auto_map={"AutoConfig": "own.Own"})
    assert f"the adapter's base model, {model}: config.json: auto_map" in error_of(load, adapter)


@pytest.mark.parametrize(
    "values",
    [
        {"_attn_implementation": "flash_attention_2"},
        {"attn_implementation": None},
        {"_attn_implementation_autoset": True},
    ],
)
def test_what_ordinary_models_have_is_no_reason(model, values):
    edit(model / "config.json", **values)
    assert load(model).config._attn_implementation == "arabic_qwen_packed"


def test_nothing_trusts_remote_code():
    package = Path(load_model.__code__.co_filename).parents[1]
    source = "".join(path.read_text(encoding="utf-8") for path in sorted(package.rglob("*.py")))
    assert "trust_remote_code=True" not in source
    assert "weights_only=False" not in source
    assert "pickle.load" not in source
    assert os.environ["DISABLE_SAFETENSORS_CONVERSION"] == "1"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = (
    *("architectures", "attn_implementation", "auto_map", "auto_mapping", "custom_generate", "eos_token_id"),
    *("model_type", "modules_to_save", "peft_type", "quantization_config", "rank_pattern", "target_modules"),
    *("tokenizer_class", "trainable_token_indices", "r", *_SIZES),
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.dictionaries(st.sampled_from(KEYS), JSON, max_size=3))
@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_any_values_load_or_are_an_error_of_ours(model, file, values):
    before = (model / file).read_text()
    try:
        edit(model / file, **values)
        edit(model / "tokenizer_config.json", eos_token=None)  # the configurations' eos_token_id is read then
        load_tokenizer(str(model))
    except ModelLoadError:
        pass
    finally:
        (model / file).write_text(before)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.dictionaries(st.sampled_from(KEYS), JSON, max_size=3))
def test_any_adapter_configuration_is_read_or_an_error_of_ours(adapter, values):
    before = (adapter / "adapter_config.json").read_text()
    try:
        edit(adapter / "adapter_config.json", **values)
        locate_model(str(adapter))
    except ModelLoadError:
        pass
    finally:
        (adapter / "adapter_config.json").write_text(before)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"num_hidden_layers": 10**9}, "describes 3e+13 weights in 1,000,000,000 layers"),
        ({"hidden_size": 10**9}, "weights in 2 layers, as no Qwen model has"),
        ({"vocab_size": 10**12}, "as no Qwen model has"),
        ({"vocab_size": 10**400}, "vocab_size is 1000"),
        ({"num_hidden_layers": 10**400}, "num_hidden_layers is 1000"),
        ({"num_attention_heads": 10**12}, "as no Qwen model has"),
        ({"intermediate_size": 2**20}, "weights, but its safetensors hold "),
        ({"num_hidden_layers": 900}, "weights, but its safetensors hold "),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1, not a whole number from 1 to 1,000,000,000,000"),
        ({"head_dim": 0}, "head_dim is 0, not"),
        ({"vocab_size": 1e3}, "vocab_size is 1000.0, not"),
        ({"hidden_size": True}, "hidden_size is True, not"),
        ({"hidden_size": [1] * 1000}, "hidden_size is [1, 1, 1"),
    ],
)
def test_absurd_sizes_are_refused_before_memory_is_taken(model, monkeypatch, values, reason):
    monkeypatch.setattr("arabic_qwen.models.loading.AutoModelForCausalLM", None)
    edit(model / "config.json", **values)
    said = error_of(load, model)
    assert said.startswith(f"{model}: config.json") and reason in said and said.endswith("; download or copy it again")
    assert len(said) < 300


@pytest.mark.parametrize("values", [{"r": 10**9}, {"r": -1}, {"r": "8"}, {"rank_pattern": {"q_proj": 10**9}}])
def test_absurd_adapters_are_refused(adapter, monkeypatch, values):
    monkeypatch.setattr("arabic_qwen.models.loading.AutoModelForCausalLM", None)
    edit(adapter / "adapter_config.json", **values)
    assert "but its weights have rank 8 at most; download" in error_of(load, adapter)


@pytest.mark.parametrize("rows", [{"embed_tokens": [5000000]}, {"embed_tokens": ["a"]}, [1], {"embed_tokens": 7}])
def test_absurd_token_rows_are_refused(adapter, monkeypatch, rows):
    monkeypatch.setattr("arabic_qwen.models.loading.AutoModelForCausalLM", None)
    edit(adapter / "adapter_config.json", trainable_token_indices=rows)
    assert "trainable_token_indices names no rows, or more than its weights hold" in error_of(load, adapter)


def test_token_rows_far_beyond_the_base(adapter, tiny_model, monkeypatch):
    """The adapter's weights hold one row, and do not say which."""
    settings = LoraConfig(
        target_modules=["q_proj"], task_type="CAUSAL_LM", trainable_token_indices={"embed_tokens": [3]}
    )
    get_peft_model(tiny_model("qwen2"), settings).save_pretrained(adapter.with_name("rows"))
    values = json.loads((adapter / "adapter_config.json").read_text())
    adapter = adapter.with_name("rows")
    edit(adapter / "adapter_config.json", base_model_name_or_path=values["base_model_name_or_path"])
    assert load(adapter)
    edit(adapter / "adapter_config.json", trainable_token_indices={"embed_tokens": [5000000]})
    monkeypatch.setattr("arabic_qwen.models.adapters.grow_embedding", None)
    assert "names row 5000000, but base and adapter have" in error_of(load, adapter)


def test_adapter_for_an_adapter(adapter, model):
    for base in (adapter, Path(shutil.copytree(adapter, adapter.with_name("other")))):
        edit(adapter / "adapter_config.json", base_model_name_or_path=str(base))
        for call in (
            load,
            lambda folder: load_tokenizer(str(folder)),
            lambda folder: locate_configuration(str(folder)),
        ):
            said = error_of(call, adapter)
            assert said.startswith(
                f"{adapter}: adapter_config.json: base_model_name_or_path is {base}, an adapter itself"
            )
