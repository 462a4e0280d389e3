"""What the model answers to a few held-out prompts at each evaluation."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from arabic_qwen.config import BaseConfig
from arabic_qwen.data.dataset import GroupDataset
from arabic_qwen.data.sources import data_seed
from arabic_qwen.data.templates import last_question
from arabic_qwen.files import append
from arabic_qwen.packing.group import Group
from arabic_qwen.redaction import redact
from arabic_qwen.runs.report import SAMPLES_FILE, read_entries
from arabic_qwen.text.dialects import UNKNOWN, load_classifier
from arabic_qwen.text.scripts import leaked_scripts, script_shares

_MAX_NEW_TOKENS = 64


class Samples:
    """Answers a seeded choice of prompts greedily, appends the answers to a file, and measures them.

    Args:
        config: eval_samples, the seed of their choice, dialect_model and the output folder.
        held_out: the validation set.
        tokenizer: that it was encoded with.

    Attributes:
        latest: the last answers, as they are in the file.
        best_step: step of the model that answers from now on, which is not the one that training has come to.
    """

    def __init__(self, config: BaseConfig, held_out: GroupDataset, tokenizer: PreTrainedTokenizerBase):
        # One of each prompt, and no answer that is to be avoided.
        groups = list({group.prompt.tobytes(): group for group in held_out.groups if group.desirable}.values())
        chosen = random.Random(data_seed(config)).sample(groups, min(config.eval_samples, len(groups)))
        self._tokenizer = tokenizer
        self._prompts = [group.prompt.tolist() for group in chosen]
        self._questions = [last_question(tokenizer, str(tokenizer.decode(group.prompt))) for group in chosen]
        self._references = [self._text(_first_answer(group)) for group in chosen]
        self._classifier = load_classifier(config.dialect_model)
        self._batch_size = config.per_device_eval_batch_size
        self._file = Path(config.resolved_output_dir, SAMPLES_FILE)
        self.latest: list[dict[str, Any]] = []
        self.best_step: int | None = None

    def __call__(self, model: Any, step: int) -> dict[str, float]:
        """Answer, write, and measure: `script_leak` and `dialect_drift`, each where there is what it is measured on.

        What the model of a step has answered already is not asked again.

        Args:
            model: in evaluation mode.
            step: the optimizer step, for the file.
        """
        if not self._prompts:
            return {}
        step = self.best_step or step
        self.latest = [sample for sample in read_entries(self._file) if sample["step"] == step]
        if not self.latest:
            self.latest = self._sample(model, step)
            append(self._file, redact("".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in self.latest)))
        leaks = [leaked_scripts(sample["prompt"], sample["answer"]) for sample in self.latest]
        pairs = zip(self.latest, self._dialects([sample["reference"] for sample in self.latest]), strict=True)
        known = [(sample["dialect"], other) for sample, other in pairs if UNKNOWN not in (sample["dialect"], other)]
        return _share("script_leak", [bool(scripts) for scripts in leaks if scripts is not None]) | _share(
            "dialect_drift", [answer != reference for answer, reference in known]
        )

    def _sample(self, model: Any, step: int) -> list[dict[str, Any]]:
        answers = self._answer(model)
        rows = zip(self._questions, answers, self._references, self._dialects(answers), strict=True)
        return [
            {
                "step": step,
                "prompt": question,
                "answer": answer,
                "reference": reference,
                "script": next(iter(script_shares(answer)), None),
                "dialect": dialect,
            }
            for question, answer, reference, dialect in rows
        ]

    def _dialects(self, texts: list[str]) -> list[str]:
        return [prediction.dialect for prediction in self._classifier.predict(texts)]

    def _answer(self, model: Any) -> list[str]:
        answers: list[str] = []
        for start in range(0, len(self._prompts), self._batch_size):
            batch = {"input_ids": self._prompts[start : start + self._batch_size]}
            inputs = self._tokenizer.pad(batch, padding_side="left", return_tensors="pt").to(model.device)
            output = model.generate(**inputs, max_new_tokens=_MAX_NEW_TOKENS, do_sample=False, use_cache=True)
            answers += map(self._text, output[:, inputs["input_ids"].shape[1] :])
        return answers

    def _text(self, ids: Any) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)).strip()


def _first_answer(group: Group) -> Any:
    """Token ids of the first answer; of a conversation there may be several in the completion."""
    ids, targets, _ = group.completions[0]
    return ids if targets.all() else ids[: targets.argmin()]


def _share(name: str, values: list[bool]) -> dict[str, float]:
    return {name: sum(values) / len(values)} if values else {}
