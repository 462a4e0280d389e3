"""`arabic-qwen compare`: answers before and after training side by side, or rated without knowing which is which."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

from arabic_qwen.config import load_config
from arabic_qwen.data.conversations import Message
from arabic_qwen.errors import ConfigurationError, DatasetError
from arabic_qwen.models.sources import RUN_CONFIG, is_run_output
from arabic_qwen.terminal import isolated
from arabic_qwen.training.base_trainer import BaseTrainer

_SIDES = {"trained": "trained_model_response", "reference": "reference_model_response"}


def compare(model: str, prompts: list[str], prompts_file: str, count: int, max_length: int) -> list[dict[str, str]]:
    """Greedy answers of a run's model and of what it was before, to the given prompts or to held-out ones.

    Raises:
        ConfigurationError: `model` is not the output folder of a run.
        DatasetError: there are no prompts.
    """
    if not is_run_output(model):
        raise ConfigurationError(f"{model}: has no {RUN_CONFIG}; give the output folder of a run")
    trainer = BaseTrainer(load_config(Path(model, RUN_CONFIG)))
    trainer.load_model(model)
    given: list[Any] = prompts or _read_prompts(prompts_file) or _held_out_prompts(trainer)
    if not given:
        raise DatasetError("there are no prompts; give some with --prompt or --prompts FILE")
    compared = trainer.generate_comparison(given[:count], max_length=max_length, do_sample=False)
    return [{**row, "prompt": _as_text(row["prompt"])} for row in compared]


def _as_text(prompt: str | list[Message]) -> str:
    """What one user says as it is; the turns of a conversation each with its role."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _read_prompts(path: str) -> list[str]:
    if not path:
        return []
    try:
        return [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: cannot be read ({error}); give a UTF-8 file with one prompt a line") from None


def _held_out_prompts(trainer: BaseTrainer) -> list[list[Message]]:
    """The conversation before the answer in each held-out row of the run's own data."""
    loader = trainer.get_data_loader()
    prompts = [loader.prompt(row.values) for row in loader.split().get("validation", [])]
    return list({json.dumps(prompt): prompt for prompt in prompts}.values())


def rate(compared: list[dict[str, str]], ratings: Path, seed: int = 0) -> Counter[str]:
    """Show each pair of answers shuffled and unnamed, ask which is better, and append the ratings to a file.

    Prompts that the file has ratings for are not asked again, so that rating can be interrupted. Where both answers are
    the same there is nothing to ask: it is a tie.

    Raises:
        DatasetError: the file cannot be read or written.

    Returns:
        How often "trained", "reference" or "tie" was preferred, over the whole file.
    """
    done = _read_ratings(ratings)
    rated = {entry["prompt"] for entry in done}
    for number, row in enumerate(compared, 1):
        if row["prompt"] in rated:
            continue
        order = random.Random(f"{seed} {row['prompt']}").sample(list(_SIDES), 2)
        place = f"[{number}/{len(compared)}] "
        print(f"\n{place}{isolated(row['prompt'], len(place))}\n")
        if row[_SIDES["trained"]] == row[_SIDES["reference"]]:
            print(f"both answers are the same, a tie: {isolated(row[_SIDES['trained']], 34)}")
            choice = "t"
        else:
            for letter, side in zip("AB", order, strict=True):
                print(f"{letter}: {isolated(row[_SIDES[side]], 3)}\n")
            choice = _ask()
        if choice == "q":
            break
        preferred = "tie" if choice == "t" else order["ab".index(choice)]
        done.append({"prompt": row["prompt"], "a": order[0], "b": order[1], "preferred": preferred})
        with ratings.open("a", encoding="utf-8") as file:
            file.write(json.dumps(done[-1], ensure_ascii=False) + "\n")
    return Counter(entry["preferred"] for entry in done)


def _read_ratings(path: Path) -> list[dict[str, str]]:
    try:
        with path.open("a+", encoding="utf-8") as file:  # fails now where it could not be written later
            file.seek(0)
            ratings = [json.loads(line) for line in file]
            if all({"prompt", "preferred"} <= rating.keys() for rating in ratings):
                return ratings
    except OSError as error:
        raise DatasetError(
            f"{path}: cannot be written ({error.strerror}); choose another file with --ratings"
        ) from None
    except (ValueError, AttributeError):
        pass
    raise DatasetError(f"{path}: does not hold ratings; choose another file with --ratings")


def _ask() -> str:
    while True:
        try:
            choice = input("better: a, b, t (tie), q (stop) > ").strip().lower()
        except EOFError:
            return "q"
        if choice in ("a", "b", "t", "q"):
            return choice
