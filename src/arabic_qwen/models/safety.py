"""What a model's files may not ask for: code to be run, kernels or modules to be fetched, pickled weights."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers
from transformers.utils import cached_file

from arabic_qwen.errors import ModelLoadError, one_line

#: How names of files end that Python unpickles, which can run any code.
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "adapter_config.json")

_MOST_WAYS = 1000  # that a regular expression may offer

_ATTENTION = {"eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention"}


def pickled_weights(folder: Path) -> list[str]:
    """Names of the pickled files in the folder."""
    found = {path.name for path in folder.iterdir() if path.suffix in PICKLED}
    return sorted(found - {"training_args.bin"})  # no weights; it is never read


def refuse_pickle(place: str | Path, file: str) -> ModelLoadError:
    """The error for a model or adapter whose weights are pickled."""
    return ModelLoadError(
        f"{place}: its weights are pickled ({file}), which can run code when they are read; get them as safetensors, or "
        "convert them where you trust them: from_pretrained, then save_pretrained, of transformers or PEFT"
    )


def check_files(name: str, path: str, files: Iterable[str] = FILES) -> None:
    """Raise ModelLoadError where a file of the model or adapter asks for code.

    Args:
        name: what the user calls it.
        path: its folder, or its hub id.
        files: those that will be used.
    """
    for file in files:
        found = cached_file(path, file, _raise_exceptions_for_missing_entries=False)
        if found is None:
            continue
        for key, reason in _PROBLEMS[file](read_json(Path(found))):
            raise ModelLoadError(
                f"{name}: {file}: {key} {reason}, which is refused; choose another model, or remove {key} where the model "
                "works without it"
            )
    if (Path(path) / "custom_generate").exists():
        raise ModelLoadError(f"{name}: the folder custom_generate brings code, which is refused; remove it")


def _code(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for key in ("auto_map", "custom_generate"):
        if values.get(key):
            yield key, "asks for code of its own"


def _model(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield from _code(values)
    for key, value in values.items():
        if key.endswith(("attn_implementation", "attn_implementation_internal", "experts_implementation")):
            names = value.values() if isinstance(value, dict) else [value]
            if not all(name is None or (isinstance(name, str) and name in _ATTENTION) for name in names):
                yield key, f"names {value!r}, a kernel that would be fetched"
    yield from _tokenizer(values)


def _tokenizer(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield from _code(values)
    name = values.get("tokenizer_class")
    if name is not None and not (isinstance(name, str) and name.isidentifier() and hasattr(transformers, name)):
        yield "tokenizer_class", f"names {name!r}, which is no class of transformers"


def _adapter(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield from _code(values)
    if values.get("peft_type", "LORA") != "LORA":
        yield "peft_type", f"is {values['peft_type']!r}; only LORA adapters are read"
    if values.get("megatron_config"):
        yield "megatron_config", "has PEFT import the module that megatron_core names"
    mapping = values.get("auto_mapping")
    library = mapping.get("parent_library") if isinstance(mapping, dict) else mapping
    if library is not None and not str(library).startswith(("transformers.", "peft.")):
        yield "auto_mapping", f"names the module {library!r}"
    for key in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
        patterns = values.get(key) or []
        if any(map(_runs_long, patterns if isinstance(patterns, list) else [patterns])):
            yield key, "is no name and no simple regular expression"
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = values.get(key) or {}
        if not isinstance(patterns, dict) or any(map(_runs_long, patterns)):
            yield key, "has no name and no simple regular expression"


def _runs_long(pattern: Any) -> bool:
    """Whether matching may take for ever.

    With one repetition, of a single character, it takes at most the square of a name's length for each way through the
    alternatives.
    """
    if not isinstance(pattern, str):
        return True
    plain = re.sub(r"\\.", "_", pattern, flags=re.DOTALL)
    ways = math.prod(1 + part.count("|") for part in re.split(r"[()]", plain))
    several = len(re.findall(r"(?<!\()[*+?{][?+]?", plain)) > 1
    return several or ways > _MOST_WAYS or bool(re.search(r"\)[*+{]|\(\?[^:=!<]", plain))  # of groups, flags


_PROBLEMS = dict(zip(FILES, (_model, _code, _tokenizer, _adapter), strict=True))


_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
)
_MOST_LAYERS, _MOST_WEIGHTS = 1000, 10**12  # far more than any Qwen model has

Shapes = Mapping[str, Sequence[int]]


def check_sizes(name: str, config: Mapping[str, Any], shapes: Shapes | None) -> None:
    """Raise ModelLoadError where config.json describes a model that no memory holds, before any is taken.

    Args:
        name: what the user calls it.
        config: what config.json holds.
        shapes: of the tensors in the model's files; None: they are not here yet.
    """
    for key in _SIZES:
        value = config.get(key)
        if value is not None and (type(value) is not int or not 1 <= value <= _MOST_WEIGHTS):
            raise _absurd(name, f"config.json: {key} is {value!r:.50}, not a whole number from 1 to {_MOST_WEIGHTS:,}")
    vocabulary, hidden, intermediate, _, layers, heads, kv_heads, _ = (config.get(key) or 1 for key in _SIZES)
    width = config.get("head_dim") or hidden // heads
    weights = vocabulary * hidden + layers * hidden * (3 * intermediate + 2 * (heads + kv_heads) * width)
    if layers > _MOST_LAYERS or weights > _MOST_WEIGHTS:
        raise _absurd(name, f"config.json describes {weights:.0e} weights in {layers:,} layers, as no Qwen model has")
    held = weights if shapes is None else sum(map(math.prod, shapes.values()))
    if weights > 2 * held:  # where only a few tensors are missing, they are named when it is loaded
        raise _absurd(name, f"config.json describes {weights:,} weights, but its safetensors hold {held:,}")


def check_ranks(name: str, config: Mapping[str, Any], shapes: Shapes) -> None:
    """Raise ModelLoadError where adapter_config.json asks for larger adapters, or more rows, than its weights are."""
    pattern = config.get("rank_pattern")
    largest = max((min(shape, default=0) for key, shape in shapes.items() if ".lora_" in key), default=0)
    for rank in (config.get("r", 1), *(pattern.values() if isinstance(pattern, dict) else ())):
        if type(rank) is not int or not 1 <= rank <= largest:
            reason = (
                f"adapter_config.json: r or rank_pattern is {rank!r:.50}, but its weights have rank {largest} at most"
            )
            raise _absurd(name, reason)
    rows = {key: shape[0] for key, shape in shapes.items() if key.endswith(".trainable_tokens_delta") and shape}
    indices = config.get("trainable_token_indices") or {}
    if not isinstance(indices, dict) or any(
        not isinstance(these, list)
        or any(type(index) is not int or index < 0 for index in these)
        or len(these) > max((n for key, n in rows.items() if f".{layer}." in key), default=0)
        for layer, these in indices.items()
    ):
        raise _absurd(name, "adapter_config.json: trainable_token_indices names no rows, or more than its weights hold")


def _absurd(name: str, reason: str) -> ModelLoadError:
    return ModelLoadError(f"{name}: {reason}; download or copy it again")


def read_json(path: Path) -> dict[str, Any]:
    """Raises ModelLoadError where the file holds no JSON object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ModelLoadError(f"{path}: cannot be read ({one_line(error)}); download or copy it again") from error
    if not isinstance(values, dict):
        raise ModelLoadError(f"{path}: holds no JSON object; download or copy it again")
    return values
