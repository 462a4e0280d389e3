"""Answers from a trainer's model, and from what it was before training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from arabic_qwen.data.conversations import Message
from arabic_qwen.data.normalization import Normalizer
from arabic_qwen.data.templates import render_prompt
from arabic_qwen.models.reference import reference_policy


class GenerationMixin:
    """What BaseTrainer generates with; needs its model, tokenizer and configuration."""

    config: Any
    model: Any
    tokenizer: Any
    trainer: Any
    _start: str
    _reference: Any
    _validated: Callable[[], Any]
    setup_model_and_tokenizer: Callable[[], None]

    def predict(self, text: str | list[str] | list[list[Message]], max_length: int = 512, **kwargs: Any) -> Any:
        """Answer a prompt, or several at once, in the prompt format that the model was trained with.

        Args:
            text: what the user says; a list is answered in batches of `per_device_eval_batch_size`, and may hold
                whole conversations, as lists of messages.
            max_length: new tokens at most.
            kwargs: for `generate()`: do_sample, temperature, top_p, top_k, repetition_penalty …

        Returns:
            The answer, or a list of answers.
        """
        conversations = []
        for prompt in [text] if isinstance(text, str) else text:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            if self.config.system_prompt and messages[0]["role"] != "system":
                messages = [{"role": "system", "content": self.config.system_prompt}, *messages]
            conversations.append(messages)
        answers = self.respond(conversations, max_length, **kwargs)
        return answers[0] if isinstance(text, str) else answers

    @torch.inference_mode()
    def respond(self, conversations: list[list[Message]], max_length: int = 512, **kwargs: Any) -> list[str]:
        """The assistant's next turn in each conversation; arguments as for :meth:`predict`.

        What the user says is normalised as questions are in the run's data.
        """
        if self.model is None:
            self.setup_model_and_tokenizer()
        self.model.eval()
        normalizer = Normalizer(self.config)
        prompts = [render_prompt(self.tokenizer, normalizer.prompt(messages)) for messages in conversations]
        answers = [""] * len(prompts)
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        size = self.config.per_device_eval_batch_size
        for batch in (by_length[i : i + size] for i in range(0, len(prompts), size)):
            inputs = self.tokenizer(
                [prompts[i] for i in batch],
                add_special_tokens=False,
                padding=True,
                padding_side="left",
                return_tensors="pt",
            ).to(self.model.device)
            output = self.model.generate(**inputs, max_new_tokens=max_length, **kwargs)
            texts = self.tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
            for i, answer in zip(batch, texts, strict=True):
                answers[i] = answer.strip()
        return answers

    def generate_comparison(
        self, prompt: str | list[str] | list[list[Message]], max_length: int = 256, **kwargs: Any
    ) -> Any:
        """Answers of the trained model and of what it was before training, side by side.

        Args:
            prompt: what the user says; or a list, as for :meth:`predict`.
            max_length: new tokens at most.
            kwargs: for `generate()`.

        Returns:
            {"prompt", "trained_model_response", "reference_model_response"}, or a list of these.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        trained = self.predict(prompts, max_length=max_length, **kwargs)
        reference = getattr(self.trainer, "reference", None) or self._reference
        if reference is None:
            self._reference = reference = reference_policy(self.model, self._start, self._validated(), self.tokenizer)
        policy = self.model
        with reference(policy) as self.model:
            try:
                self.model.generation_config = policy.generation_config  # its own may lack the template's end token
                before = self.predict(prompts, max_length=max_length, **kwargs)
            finally:
                self.model = policy
        keys = ("prompt", "trained_model_response", "reference_model_response")
        compared = [dict(zip(keys, row, strict=True)) for row in zip(prompts, trained, before, strict=True)]
        return compared[0] if isinstance(prompt, str) else compared
