"""The reference policy that preference methods compare with, and its log-probabilities kept on disk."""

from __future__ import annotations

import contextlib
import copy
import gc
import hashlib
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from peft import PeftModel, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from arabic_qwen.data.packing import Group
from arabic_qwen.errors import ConfigurationError
from arabic_qwen.files import write_atomically, writing
from arabic_qwen.models.adapters import grow_embedding, takes_from_base
from arabic_qwen.models.compilation import compile_packed
from arabic_qwen.models.loading import load_model, load_tokenizer
from arabic_qwen.models.memory_limit import within_memory
from arabic_qwen.models.scoring import score_completions
from arabic_qwen.models.sources import is_adapter

logger = logging.getLogger(__name__)

#: (policy model) -> context that gives the model to call for reference log-probabilities.
Reference = Callable[[Any], contextlib.AbstractContextManager[Any]]

REFERENCE_ADAPTER = "reference"

_NOT_THE_MODEL = {"_name_or_path", "transformers_version", "dtype", "use_cache"}
_SCALES = ("r", "lora_alpha", "use_rslora", "use_dora")  # of adapters, beside their weights


@contextlib.contextmanager
def adapters_off(model: PeftModel) -> Iterator[PeftModel]:
    """The base model under new adapters: what the policy was before training.

    PEFT's `disable_adapter` also reports on every layer, in each step, which takes longer than to switch them all.
    """
    training = model.training
    adapted = [module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    model.eval()
    try:
        for module in adapted:
            module.enable_adapters(False)
        yield model
    finally:
        for module in adapted:
            module.enable_adapters(True)
        model.train(training)


def earlier_adapter(model: Any, path: str) -> Reference:
    """The policy as an earlier run left it: a second, frozen copy of the adapters that training goes on with."""
    model.load_adapter(path, adapter_name=REFERENCE_ADAPTER, is_trainable=False)
    return _reference_adapter(model)


def initial_adapter(model: Any) -> Reference:
    """The policy with its adapters as they were new, where switching them off gives something else."""
    config = copy.deepcopy(model.peft_config["default"])
    config.init_lora_weights, config.inference_mode = True, True
    model.add_adapter(REFERENCE_ADAPTER, config)
    set_peft_model_state_dict(model, model.initial_adapter, adapter_name=REFERENCE_ADAPTER)
    return _reference_adapter(model)


def _reference_adapter(model: Any) -> Reference:
    model.set_adapter("default")

    @contextlib.contextmanager
    def reference(model: Any) -> Iterator[Any]:
        training = model.training
        model.eval()
        model.base_model.set_adapter(REFERENCE_ADAPTER, inference_mode=True)
        try:
            yield model
        finally:
            model.base_model.set_adapter("default")
            model.train(training)

    return reference


def reference_policy(model: Any, source: str, config: Any, tokenizer: Any) -> Reference:
    """The reference of a policy that training starts from `source`.

    `config.ref_model_name` where it is set; else what the policy was before training: its base model under new adapters,
    a second copy of the adapters of an earlier run or of new ones that change what the model is, or a second copy of the
    model for full fine-tuning and where biases of the base model are trained.

    Raises:
        ConfigurationError: `ref_model_name` has another vocabulary than `tokenizer`.
        ModelLoadError: it cannot be loaded.
    """
    rows = model.get_input_embeddings().weight.shape[0]

    def load(name: str, trainable: bool) -> torch.nn.Module:
        other = load_model(name, config, trainable=trainable)
        grow_embedding(other, rows)
        if getattr(model, "compiled", False):  # or it would round at other places than the policy
            compile_packed(other)
        return other

    name = getattr(config, "ref_model_name", None)
    if name:
        if load_tokenizer(name).get_vocab() != tokenizer.get_vocab():
            raise ConfigurationError(
                f"ref_model_name: {name} has another vocabulary than {source}; choose a model of the same family"
            )
        return OtherModel(lambda: load(name, trainable=False))
    if not isinstance(model, PeftModel) or _trains_biases(model) or _is_checkpoint_of_changed_base(model):
        # Loaded as the policy is, so that both round alike and the first margin is 0.
        return OtherModel(lambda: load(source, trainable=not config.use_lora))
    if is_adapter(source):
        return earlier_adapter(model, source)
    if hasattr(model, "initial_adapter"):
        return initial_adapter(model)
    return adapters_off


def _trains_biases(model: PeftModel) -> bool:
    """Trained biases belong to the base model: they stay when its adapters are switched off."""
    return any(getattr(adapter, "bias", "none") != "none" for adapter in model.peft_config.values())


def _is_checkpoint_of_changed_base(model: PeftModel) -> bool:
    return takes_from_base(model.peft_config["default"]) and not hasattr(model, "initial_adapter")


class OtherModel:
    """A second, frozen model as :data:`Reference`: a copy for full fine-tuning, or another one by name."""

    def __init__(self, load: Callable[[], torch.nn.Module]):
        self._load = load
        self._frozen: torch.nn.Module | None = self._loaded()

    def _loaded(self) -> torch.nn.Module:
        return self._load().requires_grad_(False).eval()

    def release(self) -> None:
        """Free its memory; it is loaded again when it is called for."""
        self._frozen = None
        gc.collect()  # methods of ours on its layers hold on to them

    def __call__(self, model: Any) -> contextlib.AbstractContextManager[torch.nn.Module]:
        if self._frozen is None:
            self._frozen = self._loaded()
        return contextlib.nullcontext(self._frozen)


@torch.no_grad()
def precompute(
    splits: Sequence[Sequence[Group]], model: Any, reference: Reference, cache_dir: Path, token_budget: int
) -> list[list[Group]]:
    """The groups with the reference's log-probabilities, from `cache_dir` where the same were computed before.

    The cache's names are hashes of the reference's weights and configuration and of all token ids, so that another model,
    other data or another template give another one.
    """
    with reference(model) as frozen:
        weights = _fingerprint(frozen, "default" if frozen is model else None)
        found = [_reference_logps(groups, frozen, weights, cache_dir, token_budget) for groups in splits]
    if isinstance(reference, OtherModel):
        reference.release()
    return [
        [group._replace(reference=tuple(logps)) for group, logps in zip(groups, values, strict=True)]
        for groups, values in zip(splits, found, strict=True)
    ]


def _reference_logps(
    groups: Sequence[Group], frozen: Any, weights: hashlib._Hash, cache_dir: Path, token_budget: int
) -> list[list[float]]:
    """Each group's summed log-probabilities of its scored completions; every process computes its share."""
    path = cache_dir / f"reference-{_key(weights, groups)}.safetensors"
    logps = _cached(path)
    if all(gather_object([logps is not None])):  # not all processes may see the same folder
        logger.info("reference log-probabilities: %s", path)
    else:
        state = PartialState()
        own = range(state.process_index, len(groups), state.num_processes)
        found = _compute([groups[i] for i in own], frozen, token_budget)
        everyone = dict(gather_object(list(zip(own, found, strict=True))))
        logps = torch.tensor([logp for i in range(len(groups)) for logp in everyone[i]])
        with writing(path):
            cache_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save({"logps": logps}, {"sha256": _sha256(logps)}))  # each process writes the same
    assert logps is not None
    return [part.tolist() for part in logps.split([len(_scored(group)) for group in groups])]


def _cached(path: Path) -> torch.Tensor | None:
    """What an earlier run has kept; None where that is nothing, or damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            logps, kept = file.get_tensor("logps"), file.metadata() or {}
        if kept.get("sha256") == _sha256(logps):
            return logps
    except (SafetensorError, OSError):
        pass
    logger.warning("%s: is damaged; it is computed again", path)
    return None


def _sha256(logps: torch.Tensor) -> str:
    return hashlib.sha256(logps.numpy().tobytes()).hexdigest()


def _scored(group: Group) -> list:
    return [*group.completions, *([group.mismatched] if group.mismatched else [])]


def _compute(groups: Sequence[Group], frozen: Any, token_budget: int) -> list[list[float]]:
    sums: list[list[float]] = []
    chunk = 64  # groups a progress step
    starts = range(0, len(groups), chunk)
    for start in track(starts, "Reference", disable=not sys.stderr.isatty(), transient=True):
        some = groups[start : start + chunk]
        pairs = [(group.prompt.tolist(), [c.ids.tolist() for c in _scored(group)]) for group in some]

        def score(budget: int, pairs: Any = pairs) -> list[list[torch.Tensor]]:
            return score_completions(frozen, pairs, token_budget=budget)

        found, token_budget = within_memory(score, token_budget, some)
        for group, scores in zip(some, found, strict=True):
            targets = [torch.from_numpy(completion.targets) for completion in _scored(group)]
            sums.append([logps.cpu()[mask].sum().item() for logps, mask in zip(scores, targets, strict=True)])
    return sums


def _fingerprint(frozen: Any, trained: str | None) -> hashlib._Hash:
    """Hash of weights and configuration; `trained` names the adapters that are not the reference's."""
    config = {name: value for name, value in frozen.config.to_dict().items() if name not in _NOT_THE_MODEL}
    adapters = {n: c.to_dict() for n, c in getattr(frozen, "peft_config", {}).items() if n != trained}
    computed = [{name: adapter.get(name) for name in _SCALES} for adapter in adapters.values()]
    digest = hashlib.sha256(json.dumps([config, computed], sort_keys=True, default=str).encode())
    for name, weight in frozen.state_dict().items():
        if isinstance(weight, torch.Tensor) and (trained is None or f".{trained}." not in name):
            digest.update(f"{name} {weight.dtype} {torch.is_autocast_enabled(weight.device.type)}".encode())
            digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest


def _key(weights: hashlib._Hash, groups: Sequence[Group]) -> str:
    digest = weights.copy()
    for group in groups:
        digest.update(group.prompt.tobytes())
        for completion in _scored(group):
            digest.update(b"|" + completion.ids.tobytes() + completion.targets.tobytes())
    return digest.hexdigest()[:16]
