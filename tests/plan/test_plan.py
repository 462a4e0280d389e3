"""`arabic-qwen plan`: what a run takes, before anything is loaded."""

import json
import shutil
from types import SimpleNamespace

import pytest
import yaml
from transformers import AutoModelForCausalLM

from arabic_qwen.config import METHOD_CONFIGS, DPOConfig, KTOConfig, SFTConfig
from arabic_qwen.errors import ConfigurationError, DatasetError, ModelLoadError
from arabic_qwen.memory import gpus
from arabic_qwen.models.adapters import add_lora
from arabic_qwen.plan import estimate, tables
from arabic_qwen.plan.data import LengthMix
from arabic_qwen.training.base_trainer import BaseTrainer
from tests.commands.test_cli import in_process
from tests.commands.test_dry_run import config_for

SEVEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}
HALF = SEVEN | {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
}


@pytest.fixture
def seven(tmp_path):
    """A folder with the configuration of a 7B model and nothing else."""
    folder = tmp_path / "seven"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SEVEN))
    return folder


def pairs(seven, **values):
    settings = {"model_name": str(seven), "lora_target_modules": "all-linear", "lora_dropout": 0.0}
    return DPOConfig(**settings | {"gradient_checkpointing": "auto", "max_seq_length": 2048} | values)


def on(plan):
    return {device.name: device for device in plan.devices}


@pytest.mark.parametrize("method", METHOD_CONFIGS)
def test_every_method(model_dir, method):
    found = estimate.plan(config_for(method, model_dir))
    assert [device.name for device in found.devices[1:]] == list(estimate.SHOWN)
    assert found.mix.steps
    assert all(device.fits for device in found.devices)
    assert all(device.tokens_per_s is None for device in found.devices)  # float32, of which no speed is known


def test_steps_are_those_of_the_run(model_dir, sft_file, tmp_path):
    values = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "packing": False}
    values |= {"validation_split": 0.2, "evaluation_strategy": "no", "load_best_model_at_end": False}
    config = config_for("sft", model_dir, dataset_path=str(sft_file), output_dir=str(tmp_path / "run"), **values)
    mix = estimate.plan(config).mix
    assert not (tmp_path / "run").exists()
    trainer = BaseTrainer(config)
    trainer.train()
    assert mix.steps == trainer.trainer.state.global_step
    groups = trainer.dataset["train"].groups
    assert mix.tokens == pytest.approx(sum(group.num_tokens for group in groups) / len(groups))
    assert mix.examples_a_step * mix.steps == pytest.approx(config.num_train_epochs * len(groups))


def test_a_run_of_several_billion_parameters(seven):
    devices = on(estimate.plan(pairs(seven)))
    small, large = devices["RTX 3060"], devices["H100 80GB"]
    assert large.fits and large.fit.token_budget == 8192 and large.fit.recomputed < 10
    assert not small.fits
    assert [(change.setting, change.fits) for change in small.changes] == [("load_in_4bit=true", True)]
    assert small.changes[0].saved == pytest.approx(9.4e9, rel=0.02)
    assert devices["RTX 4090"].fit.recomputed > 20
    quantized = on(estimate.plan(pairs(seven, load_in_4bit=True), ["3060"]))["RTX 3060"]
    assert quantized.fits and quantized.fit.token_budget == 8192
    whole = on(estimate.plan(pairs(seven, use_lora=False)))["H100 80GB"]
    assert [(change.setting, change.fits) for change in whole.changes] == [
        ("use_lora=true", True)
    ]  # and nothing needless
    assert sum(whole.parts) == whole.parts.total > 150e9


def test_speed_is_what_was_measured(seven):
    """DPO on an H100, compiled: 15,696 tokens/s where a prompt counts for each of its answers."""
    found = estimate.plan(pairs(seven))
    useful = 2 * (250 + 305) / found.mix.tokens
    assert on(found)["H100 80GB"].tokens_per_s * useful == pytest.approx(15_696, rel=0.05)


def test_a_small_model_waits_for_the_processor(tmp_path):
    """All weights of a 0.5B on an H100, not compiled, steps of 32 rows of 555 tokens: 30,474 tokens/s."""
    (tmp_path / "config.json").write_text(json.dumps(HALF | {"tie_word_embeddings": True}))
    whole = {"use_lora": False, "packing": False, "max_seq_length": 2048, "per_device_train_batch_size": 32}
    eager = {"torch_compile": False, "gradient_checkpointing": False, "torch_dtype": "bfloat16", "token_budget": 8192}
    found = estimate.plan(SFTConfig(model_name=str(tmp_path), **whole, **eager))
    assert on(found)["H100 80GB"].tokens_per_s == pytest.approx(30_474, rel=0.1)
    assert on(found)["A100 80GB"].tokens_per_s == on(found)["H100 80GB"].tokens_per_s
    fewer = {"per_device_train_batch_size": 8, "token_budget": 100}  # an example is a micro-batch
    few = estimate.plan(SFTConfig(model_name=str(tmp_path), **whole | eager | fewer), ["H100"])
    assert on(few)["H100 80GB"].tokens_per_s == pytest.approx(555 / (24 * 8.2e-3))


def _pass_of_reference(seven):
    """Seconds of a forward pass over a million tokens of pairs on an H100."""
    weights, head = 28 * (2 * 3584 * (3584 + 512) + 3 * 3584 * 18944), 152064 * 3584
    tokens, targets, seen = 250 + 2 * 305, 2 * 305, 250**2 / 2 + 2 * 305 * (250 + 305 / 2)
    adapters = 40_370_176
    products = 2 * (weights + adapters) * tokens + 2 * head * targets
    kept = 28 * tokens * estimate.plan(pairs(seven), ["H100"]).shape.kept_plain
    gpu = gpus.GPUS["H100 80GB"]
    seconds = products / (0.81 * gpu.peak) + 4 * 28 * 3584 * seen / (0.35 * gpu.peak) + 3.9 * kept / gpu.bandwidth
    return 1e6 / tokens * seconds


def test_fp8_is_advised_where_products_take_the_time(seven, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(HALF))

    def advised(model):
        config = pairs(model, per_device_train_batch_size=64, gradient_checkpointing="auto", torch_compile=True)
        return [faster.setting for faster in on(estimate.plan(config, ["H100"]))["H100 80GB"].faster]

    assert "base_precision=fp8" in advised(seven) and "base_precision=fp8" not in advised(tmp_path)


def test_training_all_weights(tmp_path):
    """Of a 0.5B in steps that do not wait for the processor: the gradients of all weights, and of the head's twice."""
    (tmp_path / "config.json").write_text(json.dumps(HALF))
    steps = {"packing": False, "max_seq_length": 2048, "per_device_train_batch_size": 128, "torch_compile": True}
    whole = {"use_lora": False, "gradient_checkpointing": False, "torch_dtype": "bfloat16"}
    found = estimate.plan(SFTConfig(model_name=str(tmp_path), **steps, **whole), ["H100"])
    device, gpu, tokens = on(found)["H100 80GB"], gpus.GPUS["H100 80GB"], found.mix.tokens
    weights = 24 * (2 * 896 * (896 + 128) + 3 * 896 * 4864)
    products = 6 * weights * tokens + 8 * 152064 * 896 * found.mix.targets
    attention = 3.5 * 4 * 24 * 896 * found.mix.pairs
    traffic = 3 * 3.9 * 24 * found.shape.kept_plain * tokens
    seconds = products / (0.81 * gpu.peak) + attention / (0.35 * gpu.peak) + traffic / gpu.bandwidth
    assert not device.waits and device.tokens_per_s == pytest.approx(tokens / seconds, rel=1e-3)


def test_small_steps_wait_for_the_processor(seven):
    """Twice the rows in the same time, until micro-batches are full; recomputing launches the forward kernels again."""

    def planned(rows, recomputes=False):
        config = pairs(seven, per_device_train_batch_size=rows, torch_compile=False, gradient_checkpointing=recomputes)
        return estimate.plan(config, ["H100"])

    def device(*args):
        return planned(*args).devices[1]

    said = "slowed down by the processor, which launches many small kernels: H100 80GB; a larger"
    assert [any(said in str(line) for line in tables.tables(planned(rows))) for rows in (1, 64)] == [True, False]
    one, two, full = device(1), device(2), device(64)
    assert one.waits and two.waits and not full.waits
    assert two.tokens_per_s == pytest.approx(2 * one.tokens_per_s)
    # Four passes (a reference's, forward, and the backward one is two) and one more.
    assert device(1, True).tokens_per_s == pytest.approx(4 / 5 * one.tokens_per_s)


def test_sizes_that_fp8_cannot_take_are_planned_without_it(tmp_path):
    sizes = {"hidden_size": 1000, "num_attention_heads": 10, "num_key_value_heads": 2, "intermediate_size": 20_000}
    (tmp_path / "config.json").write_text(json.dumps(SEVEN | sizes))
    found = estimate.plan(SFTConfig(model_name=str(tmp_path), per_device_train_batch_size=32), ["H100"])
    assert on(found)["H100 80GB"].tokens_per_s > 0
    assert all("fp8" not in change.setting for change in on(found)["H100 80GB"].faster)


def test_recomputing_and_a_reference_take_time(seven):
    def seconds(**values):
        config = pairs(seven, per_device_train_batch_size=16, **values)  # fewer rows wait for the processor
        return on(estimate.plan(config, ["H100"]))["H100 80GB"].seconds

    assert seconds() < seconds(gradient_checkpointing=True)
    once, thrice = ({"num_train_epochs": epochs} for epochs in (1, 3))
    assert seconds(**once, precompute_reference=True) == pytest.approx(seconds(**once))
    saved = seconds(**thrice) - seconds(**thrice, precompute_reference=True)
    assert saved == pytest.approx(2 / 3 * _pass_of_reference(seven), rel=0.01)


def test_a_reference_by_name(seven, tmp_path):
    """It is loaded as frozen weights are, of its own size, and computes as much as that size does."""
    small = tmp_path / "small"
    small.mkdir()
    sizes = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True}
    (small / "config.json").write_text(json.dumps(SEVEN | sizes))

    def on_h200(**values):
        return on(estimate.plan(pairs(seven, **values), ["H200"]))["H200"]

    whole = {"use_lora": False, "max_seq_length": 512, "optim": "adamw_8bit"}
    assert on_h200(**whole, ref_model_name=str(small)).parts.reference == pytest.approx(2 * 0.494e9, rel=0.01)
    assert on_h200(**whole).parts.reference == pytest.approx(4 * 7.616e9, rel=0.01)
    assert on_h200().parts.reference == 0
    biases = on_h200(lora_bias="all")
    assert biases.parts.reference == pytest.approx(2 * 7.616e9, rel=0.01)
    with_small = on_h200(ref_model_name=str(small))
    assert with_small.parts.reference == pytest.approx(2 * 0.494e9, rel=0.01)
    assert with_small.seconds < 0.8 * on_h200().seconds


def test_a_run_that_goes_on_from_adapters(model_dir, tmp_path):
    """Theirs are the rank and the layers, whatever the configuration says."""
    config = config_for("sft", model_dir, lora_r=4, lora_target_modules="all-linear", lora_bias="all")
    model = add_lora(AutoModelForCausalLM.from_pretrained(model_dir), config)
    model.save_pretrained(tmp_path / "adapter")
    trained = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    biases = sum(p.numel() for n, p in model.named_parameters() if n.endswith("bias"))
    later = estimate.plan(config_for("dpo", tmp_path / "adapter", lora_r=64, lora_dropout=0.5), ["H100"])
    assert later.shape.adapters == trained + biases
    assert later.devices[1].parts.reference > 0  # for their biases are trained
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match="safetensors is missing"):
        estimate.plan(config_for("dpo", tmp_path / "adapter"), ["H100"])


def test_advice_does_not_change_adapters_that_are_there(model_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(gpus.GPUS, "small", gpus.Gpu(0.505e9, 1e14, 1e12, (9, 0)))
    config = config_for("sft", model_dir, lora_r=32)
    add_lora(AutoModelForCausalLM.from_pretrained(model_dir), config).save_pretrained(tmp_path / "adapter")
    here = estimate.plan(config_for("sft", tmp_path / "adapter", token_budget=2000), ["small"])
    settings = [change.setting for change in on(here)["small"].changes]
    assert "token_budget=null" in settings and "lora_r=8" not in settings


def test_what_is_not_compiled(seven):
    """Float32 has no flash attention, which compiled layers need; nor has a GPU before Ampere."""
    values = {"max_seq_length": 8192, "gradient_checkpointing": False, "token_budget": 8192}
    eager = on(estimate.plan(pairs(seven, torch_dtype="float32", **values), ["H200"]))["H200"]
    also = on(estimate.plan(pairs(seven, torch_dtype="float32", torch_compile=False, **values), ["H200"]))["H200"]
    assert eager.parts == also.parts
    sdpa = on(estimate.plan(pairs(seven, use_flash_attention=False, **values), ["H200"]))["H200"]
    flash = on(estimate.plan(pairs(seven, **values), ["H200"]))["H200"]
    assert flash.parts.activations < 0.8 * sdpa.parts.activations


def test_this_gpu_is_what_it_is(seven, monkeypatch):
    """A T4, which is not in the table."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda *a: "Tesla T4")
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda *a: (15.6e9, 15.8e9))
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *a: (7, 5))
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: False)
    here = estimate.plan(pairs(seven, load_in_4bit=True, torch_dtype="auto"), ["H100"]).devices[0]
    assert here.name == "this Tesla T4" and here.limit == pytest.approx(0.92 * 15.6e9)  # what is free
    assert here.fits and here.tokens_per_s is None
    refused = estimate.plan(pairs(seven, load_in_4bit=True, torch_dtype="auto", torch_compile=True), ["H100"])
    assert refused.devices[0].refusal.startswith("torch_compile: needs a GPU with flash attention")
    assert not refused.devices[1].refusal


@pytest.mark.parametrize(
    "values, reason",
    [
        ({"torch_compile": True, "torch_dtype": "float32"}, "torch_compile: needs a GPU with flash attention"),
        ({"torch_compile": True, "use_flash_attention": False}, "torch_compile: needs a GPU with flash attention"),
        (
            {"torch_compile": True, "load_in_8bit": True},
            "torch_compile: does not go with load_in_8bit; set it to auto or",
        ),
        ({"base_precision": "fp8", "torch_dtype": "float32"}, "base_precision: fp8 layers give bfloat16"),
        ({"bf16": True, "fp16": True}, "bf16 and fp16 are both true; set one of them to false"),
    ],
)
def test_what_every_device_refuses_is_an_error(model_dir, values, reason):
    with pytest.raises(ConfigurationError, match=reason):
        estimate.plan(config_for("sft", model_dir, **values))


def test_sliding_windows_are_refused(seven):
    sliding = {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 2}
    (seven / "config.json").write_text(json.dumps(SEVEN | sliding))
    with pytest.raises(ModelLoadError, match="seven: has attention layers other than full attention"):
        estimate.plan(pairs(seven))


def test_lengths_that_are_advised_cut_something(seven, monkeypatch):
    """Examples of up to 5,421 tokens: a limit of 8,192 would change nothing."""
    mix = LengthMix(
        900, 900, 600, 1e6, gathered=0, longest=5421, completions=1, step=21684, epochs=3, examples_a_step=4
    )
    monkeypatch.setattr(estimate, "length_mix", lambda config: mix)
    config = SFTConfig(model_name=str(seven), max_seq_length=16384, load_in_4bit=True, lora_r=8)
    for memory, advised in ((8.9e9, "max_seq_length=4096"), (8.3e9, "max_seq_length=2048")):
        monkeypatch.setitem(gpus.GPUS, "small", gpus.Gpu(memory, 1e14, 1e12, (9, 0)))
        small = on(estimate.plan(config, ["small"]))["small"]
        assert [(change.setting, change.fits) for change in small.changes] == [(advised, True)]


def test_a_length_that_cuts_nothing_changes_nothing(seven, monkeypatch):
    """KTO's other completion counts against the budget, not as the example's length."""
    lengths = {"longest": 2300, "lengths": ((4100, 2300),) * 8}
    mix = LengthMix(
        2300, 4100, 1800, 1e6, gathered=0, completions=1, step=32800, epochs=1, examples_a_step=8, **lengths
    )
    run = estimate._Run(KTOConfig(model_name=str(seven), dataset_path="none.jsonl"), mix, None, None, {})
    length = run.config.length_key
    assert run._with([{length: 4096}]).mix == mix
    shorter = run._with([{length: 1150}]).mix
    assert shorter.longest == 1150 and shorter.lengths == ((2050, 1150),) * 8


def test_micro_batches_may_be_unfilled():
    mix = LengthMix(
        2731, 2731, 1366, 1e6, gathered=0, longest=2731, completions=1, step=21848, epochs=1, examples_a_step=8
    )
    assert mix.largest_micro_batch(8192) == 8192  # of lengths that are not known
    equal = mix._replace(lengths=((2731, 2731),) * 20)
    found = [equal.largest_micro_batch(budget) for budget in (1000, 8192, 8193, 10**6)]
    assert found == [2731, 2 * 2731, 3 * 2731, 8 * 2731]
    lengths = [(9000, 9000), *[(100, 100)] * 7, *[(1000, 1000)] * 8]
    assert mix._replace(lengths=tuple(lengths)).largest_micro_batch(8192) == 9000


def test_micro_batches_of_kto():
    """The other completion counts against the budget, but is not in the stream."""
    mix = LengthMix(
        2000, 3000, 900, 1e6, gathered=0, longest=2500, completions=1, step=24000, epochs=1, examples_a_step=8
    )
    assert [mix.largest_micro_batch(budget) for budget in (6000, 10**6, 2600)] == [4000, 16000, 2500]
    measured = mix._replace(lengths=(((3000, 1500),) * 4 + ((3000, 2500),) * 4))
    assert [measured.largest_micro_batch(budget) for budget in (3000, 10**6)] == [2500, 16000]


def test_assumed_lengths(model_dir):
    """Each completion of a shared prompt sees the prompt's keys again; a mix that is assumed says how many there are."""
    mix = estimate.plan(config_for("cpo", model_dir, dataset_path="none.jsonl")).mix
    assert mix.completions == 2 and mix.gathered == 2 * 250
    assert "prompts of 250 tokens, two answers (a chosen and one rejected) of 256" in mix.note
    assert estimate.plan(config_for("sft", model_dir, dataset_path="none.jsonl")).mix.gathered == 0
    measured = estimate.plan(config_for("dpo", model_dir)).mix
    assert measured.completions == 2 and 0 < measured.gathered < 2 * measured.tokens


@pytest.mark.parametrize(
    "name, known",
    [
        ("NVIDIA H100 80GB HBM3", "H100 80GB"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L40", None),
        ("NVIDIA A10G", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA A100-PCIE-40GB", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3060 Ti", None),
        ("NVIDIA GH200 480GB", None),
    ],
)
def test_gpus_by_the_name_that_drivers_give(name, known):
    assert gpus.gpu_named(name) == (gpus.GPUS[known] if known else None)


@pytest.mark.parametrize(
    "name, key",
    [
        *((name, name) for name in gpus.GPUS),
        ("3060", "RTX 3060"),
        ("rtx4090", "RTX 4090"),
        ("A100", "A100 80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA L4", "L4"),
    ],
)
def test_gpus_by_the_name_that_users_give(name, key):
    assert gpus.known(name) == (key, gpus.GPUS[key])


@pytest.mark.parametrize("size", ["16GB", "16 gb"])
def test_other_gpus_by_their_memory(seven, size):
    name, gpu = gpus.known(size)
    assert name == "16 GB" and 15e9 < gpu.memory < 16e9
    (card,) = estimate.plan(pairs(seven, load_in_4bit=True), [size]).devices[1:]
    assert card.fits and card.seconds is None  # its speed is not known


@pytest.mark.parametrize("name, size", [("L4", 24), ("RTX 3060", 12), ("L40S", 48), ("A100 80GB", 80), ("H200", 141)])
def test_a_size_is_not_more_than_gpus_of_that_size_have(name, size):
    assert gpus.known(f"{size}GB")[1].memory <= gpus.GPUS[name].memory


@pytest.mark.parametrize("name", ["", "0", "0GB", "a", "rtx 309", "RTX 4090 Laptop", "A10 Ti"])
def test_a_part_of_a_word_is_no_gpu(name):
    with pytest.raises(ConfigurationError, match=r"--gpu: .* is unknown"):
        gpus.known(name)


def test_as_a_verb(seven, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pairs(seven).to_yaml("dpo.yaml")
    code, text, _ = in_process(monkeypatch, capsys, "plan", "dpo.yaml")
    assert code == 0
    assert "7,615,616,512 parameters in 28 layers, 40,370,176 more in adapters; its weights are not on" in text
    assert "not read (data/training.jsonl: does not exist" in text
    for part in (
        "bfloat16, compiled: RTX 3060, ",
        "time: training steps and a precomputed reference only",
        "less time on H100 80GB: base_precision=fp8 (−22%)",
        "RTX 3060",
        "weights",
        "█",
        "load_in_4bit=true",
        "fits",
    ):
        assert part in text
    code, text, _ = in_process(monkeypatch, capsys, "plan", "dpo.yaml", "--gpu", "a100 80gb", "--gpu", "h200", "--json")
    found = json.loads(text)
    assert [device["name"] for device in found["devices"][1:]] == ["A100 80GB", "H200"]
    assert found["devices"][2]["fits"] and found["devices"][2]["recomputed_layers"] == 0
    h100 = [device for device in estimate.plan(pairs(seven)).devices if device.name == "H100 80GB"]
    assert [(device["usable"] / 1e9, device["dtype"], device["compiled"]) for device in found["devices"][1:]] == [
        (pytest.approx(77.8, abs=0.1), "bfloat16", True),
        (pytest.approx(137.6, abs=0.1), "bfloat16", True),
    ]
    assert [change.setting for change in h100[0].faster] == ["base_precision=fp8", "precompute_reference=true"]
    assert all(change.seconds < h100[0].seconds for change in h100[0].faster)
    code, text, _ = in_process(monkeypatch, capsys, "plan", "dpo.yaml", "--gpu", "3060", "--json")
    small = json.loads(text)["devices"][1]
    sizes = [small["memory"], small["peak"], *small["parts"].values()]
    sizes += [change[key] for change in small["changes"] for key in ("saved", "least")]
    assert all(type(size) is int for size in sizes)
    assert small["tokens_per_s"] is None and small["seconds"] is None


def test_help_names_the_gpus(monkeypatch, capsys):
    _, text, _ = in_process(monkeypatch, capsys, "plan", "--help")
    text = "".join(text.split()).replace("│", "")
    assert all(name.replace(" ", "") in text for name in gpus.GPUS)


def test_nothing_helps(seven, model_dir, monkeypatch):
    """Data of short examples: cutting it, or what else there is, saves next to nothing."""
    for file in model_dir.glob("tokenizer*"):
        shutil.copy(file, seven)
    monkeypatch.setitem(gpus.GPUS, "small", gpus.Gpu(6e9, 1e14, 1e12, (9, 0)))
    values = {"dataset_path": "sample:dpo", "instruction_template": "chatml"}
    plan = estimate.plan(pairs(seven, load_in_4bit=True, lora_r=8, lora_target_modules=["q_proj"], **values), ["small"])
    assert not on(plan)["small"].changes
    lines = list(tables.tables(plan))
    assert "to fit on small: a smaller model; no setting makes enough of a difference" in lines


def test_a_small_step_takes_little(seven, model_dir):
    """A step holds its batch, however many tokens would fit."""
    for file in model_dir.glob("tokenizer*"):
        shutil.copy(file, seven)
    values = {"dataset_path": "sample:dpo", "instruction_template": "chatml", "per_device_train_batch_size": 1}
    plan = estimate.plan(pairs(seven, **values), ["H100"])
    assert plan.mix.longest == plan.mix.step < 8192
    more = estimate.plan(pairs(seven, **values, gradient_accumulation_steps=4), ["H100"])
    assert plan.mix.step < more.mix.step <= 4 * plan.mix.step
    assert plan.devices[1].parts.activations < more.devices[1].parts.activations


def test_a_long_prompt_is_cut_with_its_answer(seven):
    values = {"max_seq_length": 32768, "max_prompt_length": 16384, "load_in_4bit": True}
    small = on(estimate.plan(pairs(seven, **values), ["3060"]))["RTX 3060"]
    (change,) = small.changes
    settings = dict(part.split("=") for part in change.setting.split())
    assert change.fits and int(settings["max_prompt_length"]) == int(settings["max_seq_length"]) // 2


def test_data_that_cannot_be_trained_on(model_dir, sft_file, tmp_path):
    with pytest.raises(DatasetError, match="needs"):
        estimate.plan(config_for("dpo", model_dir, dataset_path=str(sft_file)))
    with pytest.raises(DatasetError, match="sample:cpo: no such sample"):
        estimate.plan(config_for("cpo", model_dir, dataset_path="sample:cpo"))


@pytest.mark.parametrize(
    "values", [{"num_attention_heads": 27}, {"num_key_value_heads": 5}, {"hidden_act": "sillu"}, {"rope_parameters": 3}]
)
def test_a_configuration_that_makes_no_model(seven, values):
    (seven / "config.json").write_text(json.dumps(SEVEN | values))
    with pytest.raises(ModelLoadError, match=r"seven: no model can be built from its config.json \("):
        estimate.plan(pairs(seven))


@pytest.mark.parametrize("values", [{"load_in_8bit": True}, {"use_dora": True}, {"use_flash_attention": False}])
def test_speeds_that_are_not_known(seven, values):
    assert on(estimate.plan(pairs(seven, **values), ["H200"]))["H200"].seconds is None


def test_times_are_told_apart():
    texts = [tables._duration(seconds) for seconds in (63.2, 80.1, 300, 330, 4000, 300_000)]
    assert texts == ["64 s", "81 s", "5.0 min", "5.5 min", "1 h 07 min", "3.5 days"]


def test_no_speed_of_tiny_models(model_dir):
    found = estimate.plan(config_for("sft", model_dir, torch_dtype="bfloat16"), ["H100"])
    assert found.devices[1].fits and found.devices[1].tokens_per_s is None


def test_what_training_would_refuse_does_not_fit(seven):
    plan = estimate.plan(pairs(seven, base_precision="fp8"), ["3060", "A100", "4090"])
    devices = on(plan)
    assert devices["RTX 4090"].fits and not devices["RTX 4090"].refusal
    for name, capability in {"RTX 3060": "8.6", "A100 80GB": "8.0"}.items():
        found = devices[name]
        assert (
            f"fp8 needs a GPU of compute capability 8.9 or newer (Ada, Hopper), this one has {capability}"
            in found.refusal
        )
        assert (found.fits, found.tokens_per_s, found.seconds) == (False, None, None)
    assert not devices["A100 80GB"].changes
    assert [change.setting for change in devices["RTX 3060"].changes] == ["load_in_4bit=true base_precision=null"]
    assert "to fit into the memory of RTX 3060, in this order:" in list(tables.tables(plan))


@pytest.mark.parametrize(
    "values, reason",
    [
        ({"base_precision": "fp8"}, "base_precision: fp8 needs a CUDA device"),
        ({"optim": "adamw_8bit"}, "optim: adamw_8bit needs a CUDA device"),
        ({"torch_compile": True}, "torch_compile: needs a GPU with flash attention"),
        ({"load_in_8bit": True}, "load_in_8bit: needs a CUDA device"),
        ({"fp16": True}, "fp16: float16 needs a CUDA device"),
    ],
)
def test_this_processor_refuses_as_training_does(model_dir, monkeypatch, capsys, tmp_path, values, reason):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config_for("sft", model_dir, **{"torch_dtype": "bfloat16"} | values).to_yaml("sft.yaml")
    _, text, _ = in_process(monkeypatch, capsys, "plan", "sft.yaml")
    assert f"no on this processor: {reason}" in text
    _, text, _ = in_process(monkeypatch, capsys, "plan", "sft.yaml", "--gpu", "H100", "--json")
    here, there = json.loads(text)["devices"]
    assert not here["fits"] and here["refusal"].startswith(reason) and there["fits"]


@pytest.mark.parametrize(
    "values, advised",
    [
        ({"load_in_8bit": True}, "load_in_4bit=true load_in_8bit=false"),
        ({"load_in_4bit": True, "use_dora": True}, "use_dora=false"),
    ],
)
def test_what_takes_less_than_int8_and_dora(seven, monkeypatch, values, advised):
    monkeypatch.setitem(gpus.GPUS, "small", gpus.Gpu(10e9, 1e14, 1e12, (9, 0)))
    config = pairs(seven, gradient_checkpointing=True, max_length=2048, **values)
    changes = on(estimate.plan(config, ["small"]))["small"].changes
    assert [(change.setting, change.fits) for change in changes] == [(advised, True)]


@pytest.mark.parametrize(
    "values, advised",
    [
        ({"base_precision": "fp8"}, ["load_in_4bit=true base_precision=null"]),
        ({"use_lora": False, "init_lora_weights": "pissa"}, ["use_lora=true"]),
        (
            {"streaming": True, "max_steps": 9, "use_lora": False, "use_dora": True},
            ["use_lora=true", "load_in_4bit=true"],
        ),
        ({"max_length": 1000, "load_in_4bit": True, "gradient_checkpointing": False}, ["gradient_checkpointing=auto"]),
    ],
)
def test_what_is_advised_is_a_configuration(seven, monkeypatch, values, advised):
    monkeypatch.setitem(gpus.GPUS, "small", gpus.Gpu(16e9, 1e14, 1e12, (9, 0)))
    config = pairs(seven, **values)
    found = on(estimate.plan(config, ["small"]))["small"]
    assert [change.setting for change in found.changes][: len(advised)] == advised
    settings = [setting for change in found.changes for setting in change.setting.split()]
    update = {key: yaml.safe_load(value) for key, _, value in (setting.partition("=") for setting in settings)}
    again = on(estimate.plan(DPOConfig(**config.model_dump() | update), ["small"]))["small"]
    assert again.fits == found.changes[-1].fits


def test_advice_for_this_processor(seven, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=25.3e9))
    here = estimate.plan(pairs(seven, torch_dtype="bfloat16"), ["H100"]).devices[0]
    assert not here.fits
    assert here.changes[0].setting == "gradient_checkpointing=true"
    whole = estimate.plan(pairs(seven, use_lora=False), ["H100"]).devices[0]
    assert "optim=adamw_8bit" not in [change.setting for change in whole.changes]


def test_data_is_read_with_the_tokenizer_of_a_model_without_weights(seven, model_dir):
    assert "seven: has no tokenizer.json" in estimate.plan(pairs(seven, dataset_path="sample:dpo")).mix.note
    for file in model_dir.glob("tokenizer*"):
        shutil.copy(file, seven)
    config = pairs(seven, dataset_path="sample:dpo", instruction_template="chatml")
    assert "examples to train on" in estimate.plan(config).mix.note


def test_pickled_weights_are_refused(seven):
    (seven / "pytorch_model.bin").touch()
    with pytest.raises(ModelLoadError, match=r"seven: its weights are pickled \(pytorch_model.bin\)"):
        estimate.plan(pairs(seven))


def test_errors(seven, tmp_path, monkeypatch, capsys):
    with pytest.raises(ConfigurationError, match="--gpu: 'H1000' is unknown; did you mean 'H100 80GB'"):
        estimate.plan(pairs(seven), ["H1000"])
    for empty in ("", " "):
        with pytest.raises(ConfigurationError, match=r"--gpu: .* is unknown; choose from RTX 3060, "):
            estimate.plan(pairs(seven), [empty])
    with pytest.raises(ConfigurationError, match="no linear layer query"):
        estimate.plan(pairs(seven, lora_target_modules=["query"]))
    with pytest.raises(ModelLoadError, match="the folder does not exist"):
        estimate.plan(SFTConfig(model_name="./nowhere"))
    (seven / "config.json").write_text(json.dumps(SEVEN | {"model_type": "mixtral"}))
    with pytest.raises(ModelLoadError, match="of model_type 'mixtral'"):
        estimate.plan(pairs(seven))
    code, _, said = in_process(monkeypatch, capsys, "plan", tmp_path / "missing.yaml")
    assert code == 2 and "missing.yaml" in said
