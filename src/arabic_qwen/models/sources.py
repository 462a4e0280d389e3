"""Where models are loaded from, and what must hold before they are: each problem is one message, said at once."""

from __future__ import annotations

import difflib
import json
import logging
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import get_hf_file_metadata, hf_hub_url, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file

from arabic_qwen.errors import ModelLoadError

logger = logging.getLogger(__name__)

EMBEDDED_MODEL = "arabic-qwen-tiny"
RUN_CONFIG = "training_config.yaml"  # in every output folder

#: `model_type` of dense decoders whose layers and head the packed forward pass computes exactly.
SUPPORTED_MODELS = ("qwen2", "qwen3")

_HUB_NAMES = [
    *(f"Qwen/Qwen2.5-{size}{kind}" for size in ("0.5B", "1.5B", "3B", "7B", "14B", "32B", "72B") for kind in ("", "-Instruct")),
    *(f"Qwen/Qwen3-{size}{kind}" for size in ("0.6B", "1.7B", "4B", "8B", "14B") for kind in ("", "-Base")),
    "Qwen/Qwen3-32B",
]  # fmt: skip


def resolve_model_name(name: str) -> str:
    """The path of the embedded model for its name, of a folder below `~`; any other name as it is."""
    if Path(name).name == EMBEDDED_MODEL and not Path(name).is_dir():
        return str(files("arabic_qwen") / "assets" / EMBEDDED_MODEL)
    return str(Path(name).expanduser()) if name.startswith("~") else name


def is_adapter(name: str) -> bool:
    return (Path(resolve_model_name(name)) / "adapter_config.json").is_file()


def is_run_output(name: str) -> bool:
    """Whether `name` is a folder that an earlier run wrote."""
    return (Path(name) / RUN_CONFIG).is_file()


def locate_model(name: str) -> str:
    """The folder of a complete model or adapter, or the hub id of a model that the hub gives to this machine.

    A hub model that was downloaded before is found without a network too; its folder in the cache is returned then.

    Raises:
        ModelLoadError: there is no such model, or it is one that cannot be loaded.
    """
    path = resolve_model_name(name)
    if Path(path).is_file():
        raise ModelLoadError(f"{name}: is a file; give the folder of the model that it belongs to")
    if not Path(path).is_dir():
        if path.startswith(".") or Path(path).is_absolute():
            raise ModelLoadError(
                f"{name}: the folder does not exist; give the folder of a model or of a finished run, or a hub id"
            )
        path = locate_on_hub(name)
    if Path(path).is_dir():
        _check_folder(Path(path))
    if not is_adapter(path):
        _check_config(name, path)
    return path


def locate_on_hub(name: str) -> str:
    """The hub id, or the folder of an earlier download where the hub cannot be asked.

    Raises:
        ModelLoadError: the hub has no such model, or does not give it to this machine.
    """
    # One request, not repeated: from_pretrained retries for half a minute what will not get better.
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"))
        return name
    except HFValidationError:
        raise ModelLoadError(f"{name}: is neither a folder nor a hub id, which look like Qwen/Qwen2.5-7B") from None
    except Exception as error:
        cached = try_to_load_from_cache(name, "config.json")
        if not isinstance(cached, str):
            raise ModelLoadError(f"{name}: {_hub_problem(name, error)}") from error
        folder = str(Path(cached).parent)
        logger.info("%s: %s, from where it was downloaded before", name, folder)
        return folder


def _hub_problem(name: str, error: Exception) -> str:
    if is_offline_mode():
        return (
            "is no folder and was not downloaded before, and HF_HUB_OFFLINE is set; "
            f"unset it, or run `hf download {name}` where there is a network and give the folder"
        )
    if isinstance(error, GatedRepoError):
        return (
            f"the hub gives this model only to those who have accepted its terms; accept them at "
            f"https://huggingface.co/{name}, then run `hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, RepositoryNotFoundError):
        close = difflib.get_close_matches(name, _HUB_NAMES, n=1, cutoff=0.7)
        hint = f"did you mean {close[0]}?" if close else "check the name"
        return (
            f"there is no such folder, and no such model on the hub; {hint} "
            "(A private model: run `hf auth login` or set HF_TOKEN)"
        )
    if isinstance(error, EntryNotFoundError):
        return (
            "the hub has no config.json in it, so it is no model in transformers' format; choose another, "
            f"or, for an adapter, run `hf download {name} --local-dir FOLDER` and give the folder"
        )
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return "the hub refuses this machine's token; renew it with `hf auth login`, or correct or unset HF_TOKEN"
    return (
        f"there is no such folder, and the hub cannot be asked ({one_line(error)}); check the network and "
        "proxy settings, or give a folder that holds the model"
    )


def _check_folder(folder: Path) -> None:
    """Raise ModelLoadError where configuration or weights are missing or unreadable."""
    config, weights = folder / "config.json", folder / "model.safetensors"
    if is_adapter(str(folder)):
        config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if not config.is_file():
        raise ModelLoadError(
            f"{folder}: holds a run that is not finished; run the same train command again first"
            if is_run_output(str(folder))
            else f"{folder}: has no config.json, so it is no model; give the folder with config.json and safetensors"
        )
    read_json(config)
    shards = [weights]
    index = folder / "model.safetensors.index.json"
    if index.is_file() and not weights.is_file():
        shards = [folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
    missing = [shard.name for shard in shards if not shard.is_file()]
    pickled = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth") for path in folder.glob(kind))
    if missing and pickled:
        raise ModelLoadError(
            f"{folder}: its weights are pickled ({pickled[0]}), which can run code when they are read; "
            "get the model as safetensors, or convert it where you trust it: "
            "transformers' from_pretrained, then save_pretrained"
        )
    if missing:
        raise ModelLoadError(
            f"{folder}: {', '.join(missing)} is missing; download or copy the model again, or save it as safetensors"
        )
    for shard in shards:
        try:
            with safe_open(shard, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            with shard.open("rb") as file:
                pointer = file.read(20).startswith(b"version https://git")
            reason = "a Git LFS pointer, not the weights" if pointer else f"cut short or damaged: {one_line(error)}"
            remedy = "run `git lfs pull` in its folder" if pointer else "download or copy it again"
            raise ModelLoadError(f"{shard}: is {reason}; {remedy}") from error


def _check_config(name: str, path: str) -> None:
    """Raise ModelLoadError unless config.json describes a dense Qwen language model, unquantised."""
    try:
        config = read_json(Path(str(cached_file(path, "config.json"))))
    except OSError as error:
        raise load_error(name, "model", error) from error
    kind, architectures = config.get("model_type"), config.get("architectures") or []
    if kind not in SUPPORTED_MODELS:
        own_code = "auto_map" in config
        reason = "brings code of its own (auto_map), which is never run" if own_code else f"is of model_type {kind!r}"
        remedy = "choose a dense Qwen2, Qwen2.5 or Qwen3 language model"
    elif architectures and not any(architecture.endswith("ForCausalLM") for architecture in architectures):
        reason, remedy = f"is a {architectures[0]}, not a language model", "choose a model that generates text"
    elif config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method")
        reason = f"is quantised already ({method})"
        remedy = "choose the unquantised model, with load_in_4bit or load_in_8bit where memory is short"
    else:
        return
    raise ModelLoadError(f"{name}: {reason}, which cannot be trained here; {remedy}")


def read_json(path: Path) -> dict[str, Any]:
    """Raises ModelLoadError where the file holds no JSON object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelLoadError(f"{path}: cannot be read ({one_line(error)}); download or copy it again") from error
    if not isinstance(values, dict):
        raise ModelLoadError(f"{path}: holds no JSON object; download or copy it again")
    return values


def one_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def load_error(name: str, what: str, error: Exception) -> ModelLoadError:
    return ModelLoadError(
        f"{name}: the {what} cannot be loaded ({one_line(error)}); "
        "give a folder with config.json and safetensors, or a hub id that this machine can reach"
    )
