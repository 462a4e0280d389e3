"""What a model's files may not ask for: code to be run, kernels or modules to be fetched, pickled weights."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import transformers
from transformers.utils import cached_file

from arabic_qwen.errors import ModelLoadError

#: Names of files that Python unpickles, which can run any code.
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")

FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "adapter_config.json")

_ATTENTION = {"eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention"}


def pickled_weights(folder: Path) -> list[str]:
    """Names of the pickled files in the folder."""
    found = {path.name for kind in PICKLED for path in folder.glob(kind)}
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
    """Whether matching may take for ever; with one repetition it takes at most the square of a name's length."""
    return not isinstance(pattern, str) or len(re.findall(r"[*+{]", pattern)) > 1


_PROBLEMS = dict(zip(FILES, (_model, _code, _tokenizer, _adapter), strict=True))


def read_json(path: Path) -> dict[str, Any]:
    """Raises ModelLoadError where the file holds no JSON object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ModelLoadError(f"{path}: cannot be read ({one_line(error)}); download or copy it again") from error
    if not isinstance(values, dict):
        raise ModelLoadError(f"{path}: holds no JSON object; download or copy it again")
    return values


def one_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
