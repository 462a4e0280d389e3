"""What the speed benchmarks share: models of random weights, groups of random tokens, the machine and its arithmetic.

Useful tokens: a token counts once for each prompt with completion that it belongs to, as a trainer without padding and
without shared prompts would process it.

MFU is useful FLOPs / seconds / peak of dense bfloat16. Useful FLOPs are those of the products that the method cannot do
without, on separate sequences: for each token 2 FLOPs a weight of the layers forward and 2 for the gradient of their
input, 6 a weight of the adapters; for each learned token the same 4 a weight of the head; 6 instead of 4 where all weights
are trained; causal attention, 2 n² · query width forward and twice that backward for a sequence of n tokens, in each layer.
Passes without gradient (the reference
of DPO, IPO and KTO, and KTO's mismatched completions) count once forward. Recomputed activations, padding, the
optimizer and the adapters' part of a reference pass do not count. Prompts that are shared are work avoided, so they raise it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config

from arabic_qwen.config import METHOD_CONFIGS, BaseConfig
from arabic_qwen.errors import TrainingError
from arabic_qwen.memory.gpus import gpu_named
from arabic_qwen.methods.registry import METHODS
from arabic_qwen.models.loading import load_tokenizer
from arabic_qwen.models.sources import EMBEDDED_MODEL, locate_configuration
from arabic_qwen.packing.group import Completion, Group
from arabic_qwen.packing.sampler import Sequences, StepSampler
from arabic_qwen.training.base_trainer import BaseTrainer

#: Qwen2.5: hidden size, intermediate size, layers, heads, key heads, vocabulary, tied head.
SHAPES = {
    "0.5b": (896, 4864, 24, 14, 2, 151936, True),
    "1.5b": (1536, 8960, 28, 12, 2, 151936, True),
    "3b": (2048, 11008, 36, 16, 2, 151936, True),
    "7b": (3584, 18944, 28, 28, 4, 152064, False),
    "14b": (5120, 13824, 48, 40, 8, 152064, False),
}
PACKAGES = ("torch", "transformers", "peft", "trl", "unsloth")
TINY = 50e6  # parameters below which a model gets an eighth of the lengths
LONGEST = 1024  # tokens of a prompt, and of a completion


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def setting(text: str) -> str:
    """A setting as argparse takes it."""
    if not re.fullmatch(r"\w+=.*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return text


def script(main: Callable[[], Any]) -> None:
    """Run a benchmark's `main`; what the package refuses is a message, not a traceback."""
    try:
        sys.exit(main())
    except TrainingError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", default=EMBEDDED_MODEL)
    model.add_argument("--shape", choices=SHAPES, help="instead of --model: random weights in a Qwen2.5 shape")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU, else float32")
    parser.add_argument(
        "--set", action="append", type=setting, default=[], metavar="KEY=VALUE", help="a setting of ours"
    )


def shape_config(shape: str) -> Qwen2Config:
    hidden, intermediate, layers, heads, key_heads, vocabulary, tied = SHAPES[shape]
    return Qwen2Config(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=32768,
    )


def write_model(shape: str, folder: str) -> str:
    """Write a model of this shape with random bfloat16 weights, and the embedded model's tokenizer; its folder."""
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(shape_config(shape), dtype=torch.bfloat16)
    path = Path(folder, f"qwen2.5-{shape}-random")
    model.save_pretrained(path)
    del model
    torch.cuda.empty_cache()  # the runs are other processes
    load_tokenizer(EMBEDDED_MODEL).save_pretrained(path)
    return str(path)


def model_config(name: str) -> Any:
    return AutoConfig.from_pretrained(locate_configuration(name))


def count_weights(config: Any) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())


def configuration(method: str, args: argparse.Namespace, output_dir: str, **values: Any) -> BaseConfig:
    """LoRA r=16 on all linear layers, no dropout, no decay: a weight that does not move had no gradient."""
    options = {"packing": False} if method == "sft" else {"max_prompt_length": LONGEST}
    dtype = args.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    given = {key: yaml.safe_load(value) for key, _, value in (pair.partition("=") for pair in args.set)}
    settings = {
        "model_name": args.model,
        "dataset_path": getattr(args, "data", None) or "sample:sft",
        "output_dir": output_dir,
        "overwrite_output_dir": True,
        "instruction_template": "chatml",
        "max_seq_length": 2 * LONGEST,
        "lora_target_modules": "all-linear",
        "lora_dropout": 0.0,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0.0,
        "weight_decay": 0.0,
        "gradient_checkpointing": False,
        "validation_split": 0,
        "evaluation_strategy": "no",
        "save_strategy": "no",
        "load_best_model_at_end": False,
        # auto takes so few steps for a run that does not pay for it; float32 has no flash attention, int8 is not compiled
        "torch_compile": torch.cuda.is_available() and dtype != "float32" and not given.get("load_in_8bit"),
        "torch_dtype": dtype,
    }
    return METHOD_CONFIGS[method](**settings | options | values | given)


def random_groups(method: str, count: int, vocabulary: int, args: argparse.Namespace, scale: float) -> list[Group]:
    """Random tokens in the length mix that instruction data has: log-normal, medians of 200 and 250 tokens."""
    rng = np.random.default_rng(0)

    def tokens(median: float) -> np.ndarray:
        length = median if args.equal_lengths else np.clip(rng.lognormal(np.log(median), 0.6), 8, LONGEST)
        return random_tokens(rng, vocabulary, max(2, int(length * scale)))

    kind = METHODS[method].rows[0]
    completions = 1 if kind != "pair" else 1 + args.negatives if method == "cpo" else 2
    groups = [compared([tokens(200), *(tokens(250) for _ in range(completions))]) for _ in range(count)]
    if kind == "feedback":
        labelled = [
            g._replace(completions=(g.completions[0]._replace(desirable=i % 2 == 0),)) for i, g in enumerate(groups)
        ]
        neighbours = [group.completions for group in groups[-1:] + groups[:-1]]
        groups = [g._replace(auxiliary=neighbours[i]) for i, g in enumerate(labelled)]
    return groups


def compared(texts: list[np.ndarray]) -> Group:
    """A prompt with completions, the first of which is the chosen one."""
    prompt, *completions = texts
    return Group(prompt, tuple(whole(ids)._replace(desirable=not number) for number, ids in enumerate(completions)))


def random_tokens(rng: np.random.Generator, vocabulary: int, length: int) -> np.ndarray:
    return rng.integers(0, vocabulary, length, dtype=np.int32)


def whole(ids: np.ndarray) -> Completion:
    return Completion(ids, np.ones(len(ids), dtype=bool))


def load_groups(config: BaseConfig, args: argparse.Namespace) -> list[Group]:
    """The examples of all steps."""
    count = (args.warmup + args.steps) * args.batch_size
    if args.data:
        groups = BaseTrainer(config).load_and_validate_dataset()["train"].groups[:count]
        assert len(groups) == count, f"needs {count} rows, found {len(groups)}"
        return groups
    shape = model_config(config.model_name)
    scale = 1 / 8 if count_weights(shape) < TINY else 1.0
    return random_groups(config.method, count, shape.vocab_size, args, scale)


def in_training_order(config: BaseConfig, groups: list[Group]) -> list[Group]:
    """As our trainer takes them in its first epoch."""
    sequences = Sequences(groups, None)
    arguments = BaseTrainer(config).get_training_arguments()
    order = StepSampler(arguments, sequences.lengths, sequences.desirable, epoch=lambda: 0).order()
    return [groups[i] for i in order]


def useful_tokens(groups: list[Group]) -> int:
    return sum(len(group.prompt) + len(c.ids) for group in groups for c in group.completions)


def rank(config: BaseConfig) -> int | None:
    """Of the adapters; None where all weights are trained."""
    return config.lora_r if config.use_lora else None


def useful_flops(method: str, groups: list[Group], config: Any, rank: int | None) -> float:
    """FLOPs of the module's formula, for adapters of this rank on all linear layers of the layers; None: all weights."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    hidden, width, kv = config.hidden_size, config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    products = [(hidden, width), (hidden, kv), (hidden, kv), (width, hidden)]
    products += [(hidden, config.intermediate_size)] * 2 + [(config.intermediate_size, hidden)]
    layers = config.num_hidden_layers
    weights = layers * sum(a * b for a, b in products)
    adapters = layers * sum((rank or 0) * (a + b) for a, b in products)

    def cost(group: Group, completion: Completion, backward: bool) -> float:
        tokens = len(group.prompt) + len(completion.ids)
        linear = 2 * weights * tokens + 2 * hidden * config.vocab_size * int(completion.targets.sum())
        attention = 2 * layers * tokens**2 * width
        if not backward:
            return linear + attention
        return (2 if rank else 3) * linear + 3 * attention + 6 * adapters * tokens

    total = 0.0
    for group in groups:
        for completion in group.completions:
            total += cost(group, completion, True)
            if method in ("dpo", "ipo", "kto"):
                total += cost(group, completion, False)
        if group.auxiliary:
            total += 2 * cost(group, group.auxiliary[0], False)  # policy and reference
    return total


def mfu(flops: float, seconds: float) -> float | None:
    gpu = gpu_named(device_name())
    return round(flops / seconds / gpu.peak, 4) if gpu else None


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def peak_gb() -> float:
    """10⁹ bytes: the most that tensors took on the GPU; without one, that the process ever took."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2)


def machine() -> dict[str, Any]:
    found = [name for name in PACKAGES if importlib.util.find_spec(name)]
    return {
        "device": device_name(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in found},
    }


def write_json(path: str | None, report: Any) -> None:
    """Whole or not at all: an interrupted benchmark leaves what was finished."""
    if path and path != "-":
        part = Path(f"{path}.part")
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        os.replace(part, path)
