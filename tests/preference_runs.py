"""Small preference runs, and each method's loss as its paper writes it, one sequence at a time."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from arabic_qwen.config import (
    BaseConfig,
    CPOConfig,
    DPOConfig,
    IPOConfig,
    KTOConfig,
    ORPOConfig,
    SimPOConfig,
)
from arabic_qwen.packing.group import Completion, Group
from arabic_qwen.training.base_trainer import BaseTrainer

# A prompt, a good answer, and two to five bad ones.
ROWS = [
    ("ما عاصمة الأردن؟", "عاصمة الأردن هي عمّان.", ["العقبة.", "لا أعرف عاصمة الأردن، فابحث عنها أنت."]),
    ("ما عاصمة مصر؟", "عاصمة مصر هي القاهرة.", ["عاصمة مصر هي الإسكندرية.", "لندن", "أسوان"]),
    ("ما عاصمة المغرب؟", "الرباط.", ["عاصمة المغرب هي مراكش، وهي أكبر مدنه وأجملها.", "فاس"]),
    ("ما عاصمة تونس؟", "عاصمة تونس هي مدينة تونس.", ["صفاقس", "سوسة", "قابس", "بنزرت", "القيروان"]),
    ("ما عكس كلمة كبير؟", "عكس كلمة كبير هو صغير.", ["كبير جدًا.", "لا عكس لها."]),
    ("ما جمع كلمة كتاب؟", "جمع كلمة كتاب هو كتب.", ["كتابات", "كتابون، وكتابين في النصب والجر."]),
    ("ترجم إلى العربية: Good morning", "صباح الخير.", ["Good morning", "مساء الخير يا صديقي العزيز."]),
    ("ترجم إلى العربية: Thank you", "شكرًا لك.", ["Thank you!", "عفوًا", "أهلًا"]),
    ("اكتب جملة عن القراءة.", "القراءة توسّع المدارك وتنمّي الخيال.", ["قراءة.", "لا أحب القراءة."]),
    ("اشرح التعلّم الآلي.", "يتعلّم الحاسوب من الأمثلة بدل القواعد المكتوبة.", ["آلة.", "لا شيء يستحق الشرح هنا."]),
    ("كم عدد أيام الأسبوع؟", "سبعة أيام.", ["ستة أيام، من السبت إلى الخميس.", "خمسة"]),
    ("شو أخبارك؟", "الحمد لله، كلّه تمام.", ["لا أفهم سؤالك.", "أنا برنامج ولا أخبار لي."]),
]


def write_rows(path: Path, rows: list[dict]) -> Path:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_data(method: str, folder: Path) -> Path:
    """Pairs; for CPO no to five negatives, some of them hard; for KTO twenty-three labelled answers, twelve of them good."""
    rows: list[dict] = []
    for number, (question, good, bad) in enumerate(ROWS):
        if method == "kto":
            rows.append({"prompt": question, "completion": good, "label": True})
            if number:  # an odd number of rows in all
                rows.append({"prompt": question, "completion": bad[0], "label": False})
        elif method == "cpo":
            negatives = [] if number in (0, 7) else bad
            rows.append({"prompt": question, "chosen": good, "rejected": negatives[:-1]})
            rows[-1]["hard_negatives"] = negatives[-1:]
        else:
            rows.append({"prompt": question, "chosen": good, "rejected": bad[0]})
    return write_rows(folder / f"{method}.jsonl", rows)


CONFIGS: dict[str, type[BaseConfig]] = {
    "dpo": DPOConfig,
    "ipo": IPOConfig,
    "kto": KTOConfig,
    "cpo": CPOConfig,
    "simpo": SimPOConfig,
    "orpo": ORPOConfig,
}


def preference_config(method: str, model_dir: Any, data: Any, folder: Any, **values: Any) -> Any:
    """A run of three exact float32 steps without dropout, evaluation or schedule."""
    settings = dict(
        model_name=str(model_dir),
        dataset_path=str(data),
        output_dir=str(folder),
        torch_dtype="float32",
        instruction_template="chatml",
        validation_split=0,
        lora_dropout=0.0,
        lora_target_modules="all-linear",
        learning_rate=1e-3,
        warmup_ratio=0.0,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        per_device_train_batch_size=4,
        max_steps=3,
        logging_steps=1,
        eval_samples=0,
    )
    return CONFIGS[method](**(settings | values))


def trainable(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def run(config: BaseConfig) -> tuple[dict[str, torch.Tensor], BaseTrainer]:
    """Trains; the trained weights and the trainer."""
    trainer = BaseTrainer(config)
    trainer.train()
    return trainable(trainer.model), trainer


def train_on_two_processes(config: BaseConfig) -> dict[str, torch.Tensor]:
    """Trains through the command with two gloo ranks; the trained weights, read from the output folder."""
    folder = Path(config.output_dir)
    config.to_yaml(folder.with_suffix(".yaml"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, "-m", "arabic_qwen", "train", str(folder.with_suffix(".yaml"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    base = AutoModelForCausalLM.from_pretrained(config.model_name, dtype=torch.float32)
    return trainable(PeftModel.from_pretrained(base, folder, is_trainable=True))


def ready(config: BaseConfig, seed: int | None = 0) -> BaseTrainer:
    """A trainer that has everything but trained, its adapters moved off their start so that policy ≠ reference."""
    trainer = BaseTrainer(config)
    trainer.setup_model_and_tokenizer()
    if config.use_lora:
        trainer.setup_lora()
    trainer.dataset = trainer.load_and_validate_dataset()
    trainer.trainer = trainer.create_trainer(trainer.dataset, trainer.get_training_arguments(), [])
    if seed is not None:
        move_adapters(trainer.model, seed)
    return trainer


def move_adapters(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.default" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))


def losses(trainer: BaseTrainer) -> list[float]:
    assert trainer.trainer is not None
    return [entry["loss"] for entry in trainer.trainer.state.log_history if "loss" in entry]


def relative_difference(ours: dict, theirs: dict, start: dict) -> float:
    """Distance of two trained models, in units of what training changed."""
    update = sum((theirs[n] - start[n]).square().sum() for n in start).sqrt()
    assert update > 0
    return float(sum((ours[n] - theirs[n]).square().sum() for n in start).sqrt() / update)


# ---------------------------------------------------------------- one sequence at a time


def logp(model: Any, group: Group, completion: Completion) -> torch.Tensor:
    """Σ log π(target) of one ordinary forward pass over prompt and completion."""
    ids = torch.tensor([[*group.prompt.tolist(), *completion.ids.tolist()]])
    logits = model(input_ids=ids, use_cache=False).logits[0].float()
    start = len(group.prompt)
    chosen = logits[start - 1 : -1].log_softmax(-1).gather(-1, ids[0, start:, None])[:, 0]
    return chosen[torch.from_numpy(completion.targets)].sum()


def reference_logp(model: PeftModel, group: Group, completion: Completion) -> torch.Tensor:
    """The same of the base model under the adapters."""
    with torch.no_grad(), model.disable_adapter():
        return logp(model, group, completion)


def length(completion: Completion) -> int:
    return int(completion.targets.sum())


def mean(values: Any) -> Any:
    values = list(values)
    return sum(values) / len(values)


def log_sigmoid(x: torch.Tensor) -> torch.Tensor:
    return -torch.log1p(torch.exp(-x))


def smoothed(loss: Any, margin: torch.Tensor, epsilon: float) -> torch.Tensor:
    return (1 - epsilon) * loss(margin) + epsilon * loss(-margin)


def log_odds(average: torch.Tensor) -> torch.Tensor:
    return torch.log(torch.exp(average) / (1 - torch.exp(average)))


def divergence(model: Any, groups: list[Group]) -> float:
    """KTO's z: max(0, mean Δ of the mismatched completions)."""
    with torch.no_grad():
        ratios = [logp(model, g, g.auxiliary[0]) - reference_logp(model, g, g.auxiliary[0]) for g in groups]
    return max(0.0, float(mean(ratios)))


def naive_loss(config: Any, model: Any, groups: list[Group], reference: Any = reference_logp) -> torch.Tensor:
    """The step's loss, written from the papers' formulas with Python loops."""
    method = config.method
    policy = [[logp(model, g, c) for c in g.completions] for g in groups]
    sizes = [[length(c) for c in g.completions] for g in groups]
    nll = -sum(p[0] for p in policy) / sum(s[0] for s in sizes)  # mean over the step's chosen tokens
    averages = [[p / s for p, s in zip(*row, strict=True)] for row in zip(policy, sizes, strict=True)]
    if method in ("cpo", "simpo", "orpo"):
        terms = []
        for sums, means in zip(policy, averages, strict=True):
            values = means if method != "cpo" or config.loss_type in ("ipo", "simpo") else sums
            margins = [values[0] - other for other in values[1:]]
            if method == "simpo":
                (margin,) = margins
                terms.append(
                    smoothed(
                        lambda m: -log_sigmoid(m),
                        config.beta * margin - config.beta * config.gamma_beta_ratio,
                        config.label_smoothing,
                    )
                )
            elif method == "orpo":
                terms.append(-config.beta * log_sigmoid(log_odds(values[0]) - log_odds(values[1])))
            else:
                form = {
                    "sigmoid": lambda m: -log_sigmoid(config.beta * m),
                    "hinge": lambda m: torch.relu(1 - config.beta * m),
                    "ipo": lambda m: (m - 1 / (2 * config.beta)) ** 2,
                    "simpo": lambda m: -log_sigmoid(config.beta * m - config.simpo_gamma),
                }[config.loss_type]
                if config.negatives == "softmax":
                    logits = config.beta * torch.stack([torch.zeros(()), *(-m for m in margins)])
                    terms.append(-logits.log_softmax(0)[0])
                    continue
                terms.append(mean(form(m) for m in margins) if margins else torch.zeros(()))
        weight = {"cpo": getattr(config, "cpo_alpha", 0), "simpo": 0.0, "orpo": 1.0}[method]
        return mean(terms) + weight * nll

    before = [[reference(model, g, c) for c in g.completions] for g in groups]
    delta = [[p - r for p, r in zip(*row, strict=True)] for row in zip(policy, before, strict=True)]
    if method == "kto":
        z = divergence(model, groups)
        terms = []
        for (d,), group in zip(delta, groups, strict=True):
            weight = config.desirable_weight if group.desirable else config.undesirable_weight
            terms.append(weight * (1 - torch.sigmoid(config.beta * ((d - z) if group.desirable else (z - d)))))
        return mean(terms)
    if method == "ipo":
        margins = [d[0] / s[0] - d[1] / s[1] for d, s in zip(delta, sizes, strict=True)]
        target = 1 / (2 * config.tau)
        return mean(
            (1 - config.label_smoothing) * (h - target) ** 2 + config.label_smoothing * (h + target) ** 2
            for h in margins
        )
    assert method == "dpo"
    if config.loss_type == "sigmoid":
        return mean(
            smoothed(lambda m: -log_sigmoid(m), config.beta * (chosen - rejected), config.label_smoothing)
            for chosen, rejected in delta
        )
    if config.loss_type == "sft":
        return nll
    if config.loss_type == "discopop":
        margins = torch.stack([config.beta * (chosen - rejected) for chosen, rejected in delta])
        gate = torch.sigmoid(margins / config.discopop_tau)
        return ((1 - gate) * -log_sigmoid(margins) + gate * torch.exp(-margins)).mean()
    if config.loss_type == "aot_unpaired":
        upper, lower = (torch.stack([d[i] for d in delta]).sort().values for i in (0, 1))
    else:
        assert config.loss_type == "aot"
        upper, lower = (torch.stack([good - bad for good, bad in rows]).sort().values for rows in (policy, before))
    return smoothed(lambda m: -log_sigmoid(m), config.beta * (upper - lower), config.label_smoothing).mean()


def naive_rewards(config: Any, model: Any, groups: list[Group]) -> list[list[float]]:
    """The implicit reward of each completion."""
    rewards = []
    with torch.no_grad():
        for group in groups:
            row = []
            for completion in group.completions:
                value = logp(model, group, completion)
                if config.method in ("simpo", "orpo") or (
                    config.method == "cpo" and config.loss_type in ("ipo", "simpo")
                ):
                    value = value / length(completion)
                elif config.method != "cpo":
                    value = value - reference_logp(model, group, completion)
                row.append(float(config.beta * value))
            rewards.append(row)
    return rewards


@contextlib.contextmanager
def gradients_of(model: Any):
    """Collects d loss / d trained weights of what is done inside."""
    model.zero_grad()
    found: dict[str, torch.Tensor] = {}
    yield found
    found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
