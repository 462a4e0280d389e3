"""The reference policy that preference methods compare with, switched off, copied or loaded."""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper

from arabic_qwen.errors import ConfigurationError
from arabic_qwen.models.adapters import grow_embedding, takes_from_base
from arabic_qwen.models.compilation import compile_packed
from arabic_qwen.models.loading import load_model, load_tokenizer
from arabic_qwen.models.sources import is_adapter

#: (policy model) -> context that gives the model to call for reference log-probabilities.
Reference = Callable[[Any], contextlib.AbstractContextManager[Any]]

REFERENCE_ADAPTER = "reference"


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
