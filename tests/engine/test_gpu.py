"""What only a CUDA device shows: flash attention against a float64 reference, precision, quantisation."""

import gc
import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from arabic_qwen.config import METHOD_CONFIGS, CPOConfig, DPOConfig, KTOConfig, SFTConfig
from arabic_qwen.errors import TrainingError
from arabic_qwen.memory import fit as fitting
from arabic_qwen.models.adapters import add_lora
from arabic_qwen.models.attention import _segments, _varlen
from arabic_qwen.models.compilation import compile_packed
from arabic_qwen.models.kernels.fp8 import FP8Linear
from arabic_qwen.models.layers import decoder_layers
from arabic_qwen.models.loading import load_model
from arabic_qwen.models.scoring import score_completions
from arabic_qwen.packing.batch import pack
from arabic_qwen.packing.group import Completion, Group
from arabic_qwen.plan import estimate
from arabic_qwen.runs import checkpoints
from arabic_qwen.runs.state import load_state
from arabic_qwen.training.base_trainer import BaseTrainer
from tests.engine.test_guards import Faulty

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


HAS_FP8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
needs_fp8 = pytest.mark.skipif(not HAS_FP8, reason="needs an Ada, Hopper or newer GPU")
needs_bitsandbytes = pytest.mark.skipif(not HAS_BITSANDBYTES, reason="needs bitsandbytes")


def skip_what_is_lacking(values):
    """Skip a test with settings that this GPU or environment does not offer."""
    if "base_precision" in values and not HAS_FP8:
        pytest.skip("needs an Ada, Hopper or newer GPU")
    if not HAS_BITSANDBYTES and not {"load_in_4bit", "load_in_8bit", "optim"}.isdisjoint(values):
        pytest.skip("needs bitsandbytes")


def random_groups(count, max_completions):
    rng = np.random.default_rng(0)

    def tokens(low, high):
        return rng.integers(0, 300, rng.integers(low, high), dtype=np.int32)

    groups = []
    for _ in range(count):
        answers = [tokens(1, 90) for _ in range(rng.integers(1, max_completions + 1))]
        groups.append(
            Group(
                tokens(1, 120), tuple(Completion(a, np.ones(len(a), dtype=bool), not n) for n, a in enumerate(answers))
            )
        )
    return groups


@pytest.mark.parametrize("heads", [(28, 4, 128), (14, 2, 64), (16, 8, 128)])
@pytest.mark.parametrize("max_completions", [1, 4])
def test_flash_attention_is_exact(heads, max_completions):
    query_heads, key_heads, dim = heads
    batch = pack(random_groups(20, max_completions)).to("cuda")
    torch.manual_seed(0)
    shapes = [(len(batch.input_ids), h, dim) for h in (query_heads, key_heads, key_heads)]
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
    upstream = torch.randn(shapes[0], device="cuda", dtype=torch.bfloat16)

    def run(attend, dtype):
        q, k, v = (t.detach().clone().to(dtype).requires_grad_() for t in inputs)
        keys, values = (k, v) if batch.kv_index is None else (k[batch.kv_index], v[batch.kv_index])
        output = attend(q, keys, values, batch, dim**-0.5)
        output.backward(upstream.to(dtype))
        return [output, q.grad, k.grad, v.grad]

    for ours, exact in zip(run(_varlen, torch.bfloat16), run(_segments, torch.float64), strict=True):
        assert ((ours.double() - exact).norm() / exact.norm()).item() < 4e-3


@pytest.fixture
def config(model_dir, sft_file, tmp_path):
    return SFTConfig(
        model_name=str(model_dir),
        dataset_path=str(sft_file),
        output_dir=str(tmp_path / "run"),
        instruction_template="chatml",
        lora_target_modules="all-linear",
        learning_rate=1e-2,
        max_steps=20,
        logging_steps=1,
        packing=False,
        overwrite_output_dir=True,
    )


def pairs_config(config_class, model_dir, tmp_path, **values):
    rows = [{"prompt": f"سؤال رقم {i}؟", "chosen": f"جواب {i}.", "rejected": "لا أدري."} for i in range(32)]
    if config_class is KTOConfig:
        values["unpair_preferences"] = True
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return config_class(
        model_name=str(model_dir),
        dataset_path=str(data),
        output_dir=str(tmp_path / "run"),
        instruction_template="chatml",
        lora_target_modules="all-linear",
        learning_rate=2e-3,
        num_train_epochs=5,
        per_device_train_batch_size=8,
        **values,
    )


def losses(config):
    trainer = BaseTrainer(config)
    trainer.train()
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters() if p.requires_grad)
    entries = map(json.loads, (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines())
    return [entry["loss"] for entry in entries if "loss" in entry], trainer


@pytest.mark.parametrize("use_lora", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_training_in_bfloat16(config, use_lora, checkpointing):
    config.use_lora, config.gradient_checkpointing = use_lora, checkpointing
    values, trainer = losses(config)
    assert values[-1] < 0.7 * values[0]
    assert trainer.predict(["ما عاصمة الأردن؟", "مرحبا"], max_length=4)


def test_float16(config):
    config.fp16 = True
    values, _ = losses(config)
    assert values[-1] < 0.7 * values[0]


def test_flash_and_sdpa_train_alike(config):
    config.max_steps, config.learning_rate, config.lora_dropout = 3, 1e-4, 0.0
    flash, _ = losses(config)
    config.use_flash_attention = False
    sdpa, _ = losses(config)
    assert flash == pytest.approx(sdpa, rel=5e-3)


@needs_bitsandbytes
@pytest.mark.parametrize("key", ["load_in_4bit", "load_in_8bit"])
def test_quantised_base(config, key):
    setattr(config, key, True)
    values, trainer = losses(config)
    assert values[-1] < 0.8 * values[0]
    loaded = BaseTrainer(SFTConfig())
    loaded.load_model(config.output_dir)
    assert getattr(loaded.config, key)
    assert getattr(loaded.model, key.replace("load", "is_loaded"))
    rows = config.dataset_path
    assert loaded.evaluate(rows)["eval_loss"] == pytest.approx(trainer.evaluate(rows)["eval_loss"], rel=2e-2)
    config.merge_and_save, config.output_dir = True, config.output_dir + "-merged"
    _, trainer = losses(config)
    merged = BaseTrainer(SFTConfig())
    merged.load_model(config.output_dir)
    assert not getattr(merged.config, key)
    # the base that it was merged into is not quantised, which a model of random weights feels
    assert merged.evaluate(rows)["eval_loss"] == pytest.approx(trainer.evaluate(rows)["eval_loss"], rel=0.3)


def test_auto_precision(config):
    config.torch_dtype = "auto"
    values, trainer = losses(config)
    assert values[-1] < 0.7 * values[0]
    expected = torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    assert trainer.model.get_input_embeddings().weight.dtype is expected


VARIANTS = [
    {"use_rslora": True},
    {"use_dora": True},
    {"use_dora": True, "load_in_4bit": True},
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "pissa_niter_16"},
    {"init_lora_weights": "olora"},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_variants_of_lora(config, variant):
    skip_what_is_lacking(variant)
    for name, value in variant.items():
        setattr(config, name, value)
    config.learning_rate = 1e-3
    values, trainer = losses(config)
    assert values[-1] < values[0]
    loaded = BaseTrainer(SFTConfig())
    loaded.load_model(config.output_dir)
    rows = config.dataset_path
    assert loaded.evaluate(rows)["eval_loss"] == pytest.approx(trainer.evaluate(rows)["eval_loss"], rel=5e-2)


COMPILED = [
    {"torch_compile": True},
    {"torch_compile": True, "base_precision": "fp8"},
    {"torch_compile": True, "precompute_reference": True},
    {"torch_compile": True, "use_lora": False},
]


@pytest.mark.parametrize("variant", [{}, {"load_in_4bit": True}, *VARIANTS, *COMPILED], ids=str)
def test_first_margin_is_zero(model_dir, tmp_path, variant):
    skip_what_is_lacking(variant)
    trainer = BaseTrainer(pairs_config(DPOConfig, model_dir, tmp_path, lora_dropout=0.0, logging_steps=1, **variant))
    trainer.train()
    # On a 4-bit base bitsandbytes multiplies with another kernel where no gradient is needed, as in the reference's pass;
    # compiled, the two passes are different kernels too. Sums on a GPU are not in order.
    tolerance = 5e-2 if variant.get("load_in_4bit") or variant.get("torch_compile") else 1e-5
    assert trainer.trainer.state.log_history[0]["rewards/margins"] == pytest.approx(0, abs=tolerance)


@pytest.mark.parametrize("config_class", [DPOConfig, KTOConfig, CPOConfig])
@pytest.mark.parametrize("quantized", [{}, {"load_in_4bit": True}, {"load_in_8bit": True}], ids=str)
def test_preferences(model_dir, tmp_path, config_class, quantized):
    skip_what_is_lacking(quantized)
    trainer = BaseTrainer(pairs_config(config_class, model_dir, tmp_path, **quantized))
    before = trainer.evaluate()
    trainer.train()
    assert trainer.metrics["eval_rewards/margins"] > before["eval_rewards/margins"] + 0.05
    assert trainer.metrics["eval_loss"] < before["eval_loss"]


class NoWaiting(TrainerCallback):
    """Any wait for the device is an error, from the fourth step's begin to the sixth one's end; before, layers compile."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            torch.cuda.set_sync_debug_mode("error")

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 6:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("config_class", [SFTConfig, DPOConfig, KTOConfig, CPOConfig])
def test_no_step_waits_for_the_device(config, model_dir, tmp_path, config_class, compiled):
    if config_class is not SFTConfig:
        config = pairs_config(config_class, model_dir, tmp_path)
    config.max_steps, config.logging_steps, config.callbacks = 8, 100, [NoWaiting()]
    config.torch_compile = compiled
    try:
        BaseTrainer(config).train()
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Before(TrainerCallback):
    """Weights and optimizer as they are after the second update."""

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.model, self.optimizer = model, optimizer
        if state.global_step == 2:
            self.before = self.tensors()

    def tensors(self):
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        return [tensor.detach().clone() for tensor in (*self.model.parameters(), *states)]


@pytest.mark.parametrize("torch_dtype", ["bfloat16", "float16"])
def test_what_is_not_finite_stays_out(config, torch_dtype):
    config.logging_steps, config.token_budget, config.torch_dtype = 100, 1, torch_dtype
    config.callbacks = [before := Before()]
    trainer = Faulty(config)
    trainer.fault = lambda call, losses: (
        losses * (float("nan") if call == 2 * config.per_device_train_batch_size + 2 else 1)
    )
    with pytest.raises(TrainingError, match="step 3: the loss is nan"):
        trainer.train()
    pairs = list(zip(before.before, before.tensors(), strict=True))
    assert len(pairs) > 10 and all(torch.equal(old, new) for old, new in pairs)
    assert [checkpoints.step_of(path) for path in checkpoints.find_checkpoints(Path(config.output_dir))] == [2]


def test_a_step_that_did_not_fit_is_done_again(config):
    """An allocation that no GPU has, in the first step's second micro-batch."""
    config.max_steps, config.per_device_train_batch_size, config.token_budget = 2, 8, 60
    trainer = Faulty(config)

    def fault(call, losses):
        if call == 2:
            torch.empty(1 << 50, device="cuda")
        return losses

    trainer.fault = fault
    trainer.train()
    assert trainer.trainer.token_budget < 60
    assert trainer.trainer.state.global_step == 2


def test_memory_is_used_and_not_exceeded(config, monkeypatch):
    config.gradient_checkpointing, config.packing, config.max_steps = "auto", True, 3
    config.per_device_train_batch_size = 100
    trainer = BaseTrainer(config)
    engine, _ = trainer.prepare()
    engine.fits_budget = engine.fits_recompute = False
    engine.train()  # brings in kernels and their workspaces
    engine.fits_budget = engine.fits_recompute = True
    groups = sorted(engine.train_groups, key=lambda group: -group.num_tokens)
    measure = fitting.CudaMeasure(engine.model, groups, 4096, 0)
    random_state = torch.cuda.get_rng_state()
    needed = measure(2048, 1)
    assert torch.equal(torch.cuda.get_rng_state(), random_state)
    assert all(parameter.grad is None for parameter in engine.model.parameters())
    assert measure(2048, 0) < 1.01 * needed < measure(2048, 2) < measure(4096, 2)  # none kept is nearly as much as one
    monkeypatch.setattr(fitting.CudaMeasure, "memory", lambda self: round(needed * 1.01 / fitting.USABLE))
    engine.recomputed = None
    engine.token_budget, engine.fits_budget = 2048, False
    fitting.fit(engine)
    assert engine.recomputed == 1
    assert [layer.gradient_checkpointing for layer in decoder_layers(engine.model)] == [True, False]
    torch.cuda.reset_peak_memory_stats()
    engine.train()
    assert torch.cuda.max_memory_allocated() < 1.05 * needed


@pytest.fixture(scope="module")
def wide_dir(model_dir, tiny_model, tmp_path_factory):
    """Three layers of the 7B shape."""
    sizes = {
        "vocab_size": 8192,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 3,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "max_position_embeddings": 2048,
        "initializer_range": 0.02,
    }
    path = tmp_path_factory.mktemp("wide")
    shutil.copytree(model_dir, path, dirs_exist_ok=True)
    with torch.device("cuda"):
        tiny_model(tied=False, **sizes).to(torch.bfloat16).save_pretrained(path)
    return path


def wide_config(method, wide_dir, tmp_path, **values):
    """Two steps of 8,192 tokens at a time, of examples of all lengths up to 1,024."""
    rng = np.random.default_rng(0)

    def text():
        return " ".join(map(str, rng.integers(0, 10_000, rng.integers(10, 200))))

    names = {"sft": ("instruction", "response"), "kto": ("prompt", "completion")}.get(
        method, ("prompt", "chosen", "rejected")
    )
    rows = [{name: text() for name in names} for _ in range(64)]
    for number, row in enumerate(rows):
        row |= {"label": number % 2 == 0} if method == "kto" else {}
        row |= {"rejected": [text() for _ in range(4)]} if method == "cpo" else {}
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return METHOD_CONFIGS[method](
        model_name=str(wide_dir),
        dataset_path=str(data),
        output_dir=str(tmp_path / "run"),
        instruction_template="chatml",
        lora_target_modules="all-linear",
        max_seq_length=1024,
        per_device_train_batch_size=64,
        gradient_accumulation_steps=1,
        token_budget=8192,
        max_steps=2,
        validation_split=0,
        evaluation_strategy="no",
        eval_samples=0,
        save_strategy="no",
        load_best_model_at_end=False,
        **({"packing": False} if method == "sft" else {}) | values,
    )


@pytest.mark.parametrize("gradient_checkpointing", [True, False])
@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("sft", {}),
        ("sft", {"packing": True, "torch_compile": True}),
        ("sft", {"load_in_4bit": True}),
        ("sft", {"load_in_8bit": True}),
        ("sft", {"base_precision": "fp8"}),
        ("sft", {"use_dora": True}),
        ("sft", {"use_lora": False}),
        ("sft", {"use_lora": False, "optim": "adamw_8bit"}),
        ("dpo", {}),
        ("dpo", {"use_lora": False}),
        ("dpo", {"ref_model_name": True}),
        ("dpo", {"load_in_4bit": True, "torch_compile": True}),
        ("kto", {}),
        ("cpo", {}),
    ],
    ids=str,
)
def test_memory_is_what_plan_says(wide_dir, tmp_path, method, values, gradient_checkpointing):
    skip_what_is_lacking(values)
    if "ref_model_name" in values:
        values = values | {"ref_model_name": str(wide_dir)}
    config = wide_config(method, wide_dir, tmp_path, gradient_checkpointing=gradient_checkpointing, **values)
    planned = estimate.plan(config).devices[0].parts
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    BaseTrainer(config).train()
    shutil.rmtree(config.output_dir)
    assert torch.cuda.max_memory_allocated() - before == pytest.approx(planned.total, rel=0.1), planned


def relative(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


@needs_fp8
@pytest.mark.parametrize(("inputs", "outputs"), [(3584, 18944), (18944, 3584), (896, 128)])
@pytest.mark.parametrize("compiled", [False, True])
def test_fp8_products(inputs, outputs, compiled):
    torch.manual_seed(0)
    linear = torch.nn.Linear(inputs, outputs, bias=outputs == 128, device="cuda", dtype=torch.bfloat16)
    layer = FP8Linear(linear, trainable=True)
    if compiled:
        layer.compile(dynamic=True)
    for rows in (17, 4099, 1):
        x = torch.randn(1, rows, inputs, device="cuda", dtype=torch.bfloat16)
        x[..., 5] *= 100  # as Qwen's activations have
        x.requires_grad_()
        upstream = torch.randn(1, rows, outputs, device="cuda", dtype=torch.bfloat16)
        with torch.autocast("cuda", torch.bfloat16):
            y = layer(x)
        y.backward(upstream)
        exact = torch.nn.functional.linear(x.double(), *[parameter.double() for parameter in linear.parameters()])
        assert relative(y, exact) < 0.04
        assert relative(x.grad, upstream.double() @ linear.weight.double()) < 0.04


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("base_precision", [None, pytest.param("fp8", marks=needs_fp8)])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "gate_proj", "up_proj"]])
def test_compiled_layers_compute_the_same(model_dir, targets, base_precision, checkpointing):
    config = SFTConfig(base_precision=base_precision, lora_target_modules=targets, lora_dropout=0.0)
    groups = [([3, 4, 5], [[6, 7, 8], [9]]), ([7] * 40, [[8] * 33])]

    def run(compiled):
        model = add_lora(load_model(str(model_dir), config, trainable=True), config).train()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator("cuda").manual_seed(0))
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if compiled:
            compile_packed(model)
        for some in (groups[:1], [([3, 4], [[]])], groups):  # other lengths; no target
            model.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                logps = torch.cat([part for parts in score_completions(model, some) for part in parts])
            logps.sum().backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        assert all(p.grad is not None and p.grad.any() for p in trained)
        return logps.detach(), torch.cat([p.grad.flatten() for p in trained])

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        found = run(compiled=True)
    kernels = " ".join(event.key for event in profile.key_averages())
    assert all(name in kernels for name in ("_head_scores", "_swiglu_backward"))
    for ours, eager in zip(found, run(compiled=False), strict=True):
        assert relative(ours, eager.double()) < 0.05  # sums in another order


@needs_fp8
def test_fp8_base(config):
    config.lora_dropout, config.learning_rate, config.max_steps = 0.0, 5e-3, 10
    plain, _ = losses(config)
    config.base_precision = "fp8"
    values, trainer = losses(config)
    assert values == pytest.approx(plain, rel=0.05) and values != plain
    assert trainer.predict(["ما عاصمة الأردن؟", "مرحبا"], max_length=4)
    assert trainer.generate_comparison("مرحبا", max_length=2)
    loaded = BaseTrainer(SFTConfig())
    loaded.load_model(config.output_dir)
    assert loaded.config.base_precision == "fp8"
    rows = config.dataset_path
    assert loaded.evaluate(rows)["eval_loss"] == pytest.approx(trainer.evaluate(rows)["eval_loss"], rel=1e-3)


@needs_fp8
@pytest.mark.parametrize("config_class", [DPOConfig, KTOConfig, CPOConfig])
def test_preferences_on_an_fp8_base(model_dir, tmp_path, config_class):
    values = {"base_precision": "fp8", "lora_dropout": 0.0, "logging_steps": 1}
    trainer = BaseTrainer(pairs_config(config_class, model_dir, tmp_path, **values))
    before = trainer.evaluate()
    trainer.train()
    assert trainer.metrics["eval_rewards/margins"] > before["eval_rewards/margins"] + 0.05
    if config_class is DPOConfig:  # the reference is on the same base
        assert trainer.trainer.state.log_history[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)


@needs_bitsandbytes
@pytest.mark.parametrize("use_lora", [True, False])
def test_8_bit_optimizer(config, tmp_path, use_lora):
    config.use_lora, config.lora_r, config.learning_rate = use_lora, 64, 1e-2 if use_lora else 1e-3
    plain, _ = losses(config)
    config.optim = "adamw_8bit"
    values, _ = losses(config)
    assert values[-1] < 0.7 * values[0]
    assert values == pytest.approx(plain, rel=0.2)


@needs_bitsandbytes
def test_8_bit_optimizer_goes_on_exactly(config, tmp_path):
    config.optim, config.lora_r, config.max_steps, config.save_steps = "adamw_8bit", 64, 6, 3
    config.evaluation_strategy, config.use_flash_attention = "no", False
    config.torch_dtype = "float32"
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        BaseTrainer(config).train()
        whole = Path(config.output_dir)
        again = tmp_path / "again"
        shutil.copytree(whole / "checkpoint-3", again / "checkpoint-3")
        for name in ("training_config.yaml", "metrics.jsonl"):
            shutil.copy(whole / name, again)
        config.output_dir, config.overwrite_output_dir = str(again), False
        BaseTrainer(config).train()
    finally:
        torch.use_deterministic_algorithms(False)
    expected, found = (load_state(folder / "checkpoint-6" / "optimizer")["state"] for folder in (whole, again))
    dtypes = {state["__bnb_optimizer_quant_state__"]["state1"].dtype for state in expected.values()}
    assert dtypes == {torch.uint8, torch.float32}  # the latter below 4,096 elements
    for number, state in expected.items():
        for name, tensor in state["__bnb_optimizer_quant_state__"].items():
            assert torch.equal(tensor, found[number]["__bnb_optimizer_quant_state__"][name]), name
    assert (whole / "adapter_model.safetensors").read_bytes() == (again / "adapter_model.safetensors").read_bytes()
