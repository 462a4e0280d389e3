"""What the engine overrides of transformers.Trainer beside its public methods: little, and still there."""

import inspect

import pytest
import transformers
from transformers import Trainer

from arabic_qwen.engine.trainer import PackedTrainer

pytestmark = pytest.mark.engine

# Why each is needed: no callback or public method comes at that moment.
PRIVATE = {
    "_run_epoch": "an evaluation that a signal has put off is made up before the first step",
    "_maybe_log_save_evaluate": "a signal is followed once the step is logged and saved",
    "_get_grad_norm": "an update is judged between clipping and the optimizer's step",
    "_save_checkpoint": "checkpoints are written whole",
    "_load_rng_state": "random states are ours, and are restored after the data is skipped",
    "_finalize_training": "a stopped run loads no best model",
}


def overridden() -> set[str]:
    own = {name for kind in PackedTrainer.__mro__ for name in vars(kind) if kind.__module__.startswith("arabic_qwen")}
    return {name for name in own if name[0] == "_" and name[:2] != "__" and hasattr(Trainer, name)}


def test_six_private_methods_and_no_more():
    assert overridden() == PRIVATE.keys()


@pytest.mark.parametrize("name", PRIVATE)
def test_the_library_still_calls_it(name):
    called = any(
        f"self.{name}(" in inspect.getsource(function)
        for _, function in inspect.getmembers(Trainer, inspect.isfunction)
    )
    assert called, f"transformers {transformers.__version__} calls no Trainer.{name} any more, by which {PRIVATE[name]}"
