"""A tiny tokenizer, tiny models and a small Arabic data set, built anew for each test session."""

import gc
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # of commands that tests start too: workers already use all cores

import pytest
import torch
from hypothesis import settings
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # the background jobs of a shell ignore it

# Times vary too much on shared machines for a deadline per example; the same examples are tried on each run.
settings.register_profile("suite", deadline=None, derandomize=True, database=None)
settings.load_profile("suite")


def pytest_collection_finish() -> None:
    """What has been imported by now stays; each run's gc.collect() need not look through it again."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that run whole programs first, so that no worker is left alone with them at the end."""
    items.sort(key=lambda item: item.path.name not in ("test_docs.py", "test_cli.py"))


QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CORPUS = [
    "ما عاصمة الأردن؟ عاصمة الأردن هي عمّان، وهي أكبر مدنه.",
    "اكتب جملة عن فوائد القراءة. القراءة توسّع المدارك وتنمّي الخيال.",
    "ترجم إلى العربية: صباح الخير. كيف حالك اليوم؟ أنا بخير، شكرًا لك.",
    "اشرح معنى التعلّم الآلي بلغة بسيطة: يتعلّم الحاسوب من الأمثلة.",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "The quick brown fox jumps over the lazy dog. What is the capital of France? Paris.",
    "system user assistant ### Instruction: ### Response: You are a helpful assistant.",
]

SFT_ROWS = [
    ("ما عاصمة الأردن؟", "عاصمة الأردن هي عمّان."),
    ("ما عاصمة مصر؟", "عاصمة مصر هي القاهرة."),
    ("ما عاصمة المغرب؟", "عاصمة المغرب هي الرباط."),
    ("ما عاصمة تونس؟", "عاصمة تونس هي مدينة تونس."),
    ("ما عكس كلمة كبير؟", "عكس كلمة كبير هو صغير."),
    ("ما جمع كلمة كتاب؟", "جمع كلمة كتاب هو كتب."),
    ("ترجم إلى العربية: Good morning", "صباح الخير."),
    ("ترجم إلى العربية: Thank you", "شكرًا لك."),
    ("اكتب جملة عن القراءة.", "القراءة توسّع المدارك وتنمّي الخيال."),
    ("اشرح التعلّم الآلي.", "يتعلّم الحاسوب من الأمثلة بدل القواعد المكتوبة."),
    ("كم عدد أيام الأسبوع؟", "سبعة أيام."),
    ("شو أخبارك؟", "الحمد لله، كلّه تمام."),
]


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory) -> Path:
    """A byte-level BPE vocabulary that splits text as Qwen2's does."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    backend.save(str(path))
    return path


@pytest.fixture
def tokenizer(tokenizer_file) -> PreTrainedTokenizerFast:
    """A tokenizer of its own for each test, which may set its chat template."""
    return PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_file),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
    )


@pytest.fixture(scope="session")
def tiny_model(tokenizer_file) -> Callable[..., PreTrainedModel]:
    """`tiny_model(kind, tied=…, seed=…, **config)`: a new float32 model; the same seed gives the same weights."""
    vocab_size = Tokenizer.from_file(str(tokenizer_file)).get_vocab_size()

    def build(kind: str = "qwen2", *, tied: bool = True, seed: int = 0, **config) -> PreTrainedModel:
        config_class, model_class = {
            "qwen2": (Qwen2Config, Qwen2ForCausalLM),
            "qwen3": (Qwen3Config, Qwen3ForCausalLM),
        }[kind]
        sizes = {
            "vocab_size": vocab_size,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 512,
            "tie_word_embeddings": tied,
            "initializer_range": 0.2,  # far from uniform predictions and equal attention
            "bos_token_id": None,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
        torch.manual_seed(seed)
        model = model_class(config_class(**(sizes | config)))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):  # zero otherwise
                    parameter.normal_(std=0.2)
        return model.eval()

    return build


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory, tiny_model, tokenizer_file) -> Path:
    """A folder that can be given as `model_name`. Shared: do not write into it."""
    path = tmp_path_factory.mktemp("tiny-qwen2")
    tiny_model("qwen2").save_pretrained(path)
    PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_file),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def sft_file(tmp_path_factory) -> Path:
    """Twelve instruction/response rows in Arabic. Shared: do not write into it."""
    path = tmp_path_factory.mktemp("data") / "sft.jsonl"
    lines = [json.dumps({"instruction": q, "response": a}, ensure_ascii=False) for q, a in SFT_ROWS]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
