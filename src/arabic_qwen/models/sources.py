"""Where models are loaded from, and what must hold before they are: each problem is one message, said at once."""

from __future__ import annotations

import difflib
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

from arabic_qwen.errors import ModelLoadError, one_line
from arabic_qwen.models.safety import (
    PICKLED,
    check_files,
    check_ranks,
    check_sizes,
    pickled_weights,
    read_json,
    refuse_pickle,
)

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


def base_of(adapter: str) -> str:
    """The name of the model that an adapter's folder is for. Raises ModelLoadError where that is an adapter itself."""
    base = str(read_json(Path(adapter) / "adapter_config.json").get("base_model_name_or_path"))
    if is_adapter(base):  # transformers would load it, unchecked, and what it is for
        raise ModelLoadError(
            f"{adapter}: adapter_config.json: base_model_name_or_path is {base}, an adapter itself; name the model that "
            "it is for"
        )
    return base


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
        if Path(path).suffix in PICKLED:
            raise refuse_pickle(name, Path(path).name)
        raise ModelLoadError(f"{name}: is a file; give the folder of the model that it belongs to")
    if not Path(path).is_dir():
        if path.startswith(".") or Path(path).is_absolute():
            raise ModelLoadError(
                f"{name}: the folder does not exist; give the folder of a model or of a finished run, or a hub id"
            )
        path = locate_on_hub(name)
    shapes = _check_folder(Path(path)) if Path(path).is_dir() else None
    try:
        check_files(name, path)
        if is_adapter(path):
            check_ranks(name, read_json(Path(path) / "adapter_config.json"), shapes or {})
        else:
            _check_config(name, path, shapes)
    except OSError as error:  # the hub's
        raise load_error(name, "model", error) from error
    return path


def locate_configuration(name: str) -> str:
    """The folder or hub id whose config.json describes the model, or an adapter's base model; weights may be missing.

    Raises:
        ModelLoadError: there is none, or it is of a model that cannot be trained, or whose weights are pickled.
    """
    path = resolve_model_name(name)
    if is_adapter(path):
        return locate_configuration(base_of(path))
    if not (Path(path) / "config.json").is_file():
        return locate_model(name)
    if not any(Path(path).glob("*.safetensors")) and (pickled := pickled_weights(Path(path))):
        raise refuse_pickle(name, pickled[0])
    check_files(name, path)
    _check_config(name, path, None)
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


def _check_folder(folder: Path) -> dict[str, list[int]]:
    """The shapes of the tensors in its files. Raises ModelLoadError where configuration or weights are unreadable."""
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
        shards = _shards(index)
    missing = [shard.name for shard in shards if not shard.is_file()]
    pickled = pickled_weights(folder)
    if missing and pickled:
        raise refuse_pickle(folder, pickled[0])
    if missing:
        raise ModelLoadError(
            f"{folder}: {', '.join(missing)} is missing; download or copy the model again, or save it as safetensors"
        )
    shapes: dict[str, list[int]] = {}
    for shard in shards:
        try:
            with safe_open(shard, "pt") as tensors:
                shapes |= {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            with shard.open("rb") as file:
                pointer = file.read(20).startswith(b"version https://git")
            reason = "a Git LFS pointer, not the weights" if pointer else f"cut short or damaged: {one_line(error)}"
            remedy = "run `git lfs pull` in its folder" if pointer else "download or copy it again"
            raise ModelLoadError(f"{shard}: is {reason}; {remedy}") from error
    return shapes


def _shards(index: Path) -> list[Path]:
    """The files of weights that the index names, which lie beside it."""
    weights = read_json(index).get("weight_map")
    names = set(weights.values()) if isinstance(weights, dict) and all(map(_is_name, weights.values())) else set()
    if not names:
        raise ModelLoadError(f"{index}: weight_map must name files of its folder; download or copy it again")
    return [index.parent / name for name in sorted(names)]


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value.endswith(".safetensors") and not set(value) & set("/\\\0")


def _check_config(name: str, path: str, shapes: dict[str, list[int]] | None) -> None:
    """Raise ModelLoadError unless config.json describes a dense Qwen language model, unquantised, of a possible size."""
    config = read_json(Path(str(cached_file(path, "config.json"))))
    kind, architectures = config.get("model_type"), config.get("architectures") or []
    architectures = architectures if isinstance(architectures, list) else [architectures]
    if kind not in SUPPORTED_MODELS:
        reason = f"is of model_type {kind!r}"
        remedy = "choose a dense Qwen2, Qwen2.5 or Qwen3 language model"
    elif architectures and not any(str(architecture).endswith("ForCausalLM") for architecture in architectures):
        reason, remedy = f"is a {architectures[0]}, not a language model", "choose a model that generates text"
    elif config.get("quantization_config"):
        quantized = config["quantization_config"]
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        reason = f"is quantised already ({method})"
        remedy = "choose the unquantised model, with load_in_4bit or load_in_8bit where memory is short"
    else:
        return check_sizes(name, config, shapes)
    raise ModelLoadError(f"{name}: {reason}, which cannot be trained here; {remedy}")


def load_error(name: str, what: str, error: Exception) -> ModelLoadError:
    return ModelLoadError(
        f"{name}: the {what} cannot be loaded ({one_line(error)}); "
        "give a folder with config.json and safetensors, or a hub id that this machine can reach"
    )
