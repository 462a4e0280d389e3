"""Kahneman-Tversky optimisation (Ethayarajh et al., 2024, https://arxiv.org/abs/2402.01306)."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from arabic_qwen.data.bad_rows import RowError
from arabic_qwen.data.conversations import Conversation
from arabic_qwen.data.preferences import to_feedback, to_pair
from arabic_qwen.methods.preference import ReferenceConfig
from arabic_qwen.methods.registry import Method


class KTOConfig(ReferenceConfig):
    """Kahneman-Tversky optimisation (Ethayarajh et al., 2402.01306): answers that are good or bad, not pairs."""

    method: ClassVar[str] = "kto"
    learning_rate: float = Field(default=1e-6, gt=0, description="Peak learning rate")
    desirable_weight: float = Field(default=1.0, ge=0, description="Weight of desirable answers")
    undesirable_weight: float = Field(default=1.0, ge=0, description="Weight of undesirable answers")
    unpair_preferences: bool = Field(
        default=False, description="Also read chosen/rejected pairs, each as a good and a bad answer"
    )


def read(values: dict[str, Any], config: KTOConfig) -> list[Conversation]:
    """A labelled answer; or each answer of a pair, with `unpair_preferences`."""
    if "chosen" not in values or "completion" in values:
        return [to_feedback(values, config.system_prompt)]
    if not config.unpair_preferences:
        raise RowError("is a pair; set unpair_preferences to true to learn from each of its answers")
    pair = to_pair(values, config.system_prompt)
    answers = zip(pair.answers, pair.desirable, strict=True)
    return [pair._replace(answers=[answer], desirable=(good,)) for answer, good in answers]


METHOD = Method(
    KTOConfig,
    rows=("feedback",),
    read=read,
    auxiliary="arabic_qwen.data.auxiliary:mismatched",
    objective="arabic_qwen.methods.kto.loss:objective",
)
