"""Every preference method and the untouched model on the same pairs: one table, one plot.

    python examples/multi_method_comparison.py                        # tiny model, sample data
    python examples/multi_method_comparison.py MODEL PAIRS.jsonl      # yours

All methods start from the same model and hold out the same pairs. They are judged alike, by the log-probabilities of
the held-out answers: how often the chosen one is likelier than the rejected one, summed and averaged over tokens.
"""

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

from arabic_qwen.config import CPOConfig, DPOConfig, IPOConfig, KTOConfig, ORPOConfig, SimPOConfig
from arabic_qwen.models.scoring import score_completions
from arabic_qwen.training.base_trainer import BaseTrainer

model = sys.argv[1] if len(sys.argv) > 1 else "arabic-qwen-tiny"
data = sys.argv[2] if len(sys.argv) > 2 else "sample:dpo"
output = Path("./checkpoints/comparison")

common = dict(
    model_name=model,
    dataset_path=data,
    validation_split=0.25,
    instruction_template="tokenizer",
    lora_target_modules="all-linear",
    per_device_train_batch_size=8,
    learning_rate=5e-4 if model == "arabic-qwen-tiny" else 2e-5,
)
configs = {
    "DPO": DPOConfig(**common),
    "IPO": IPOConfig(**common),
    "KTO": KTOConfig(unpair_preferences=True, **common),
    "CPO": CPOConfig(**common),
    "SimPO": SimPOConfig(**common),
    "ORPO": ORPOConfig(**common),
}


def accuracies(trainer: BaseTrainer, pairs) -> tuple[float, float]:
    """Share of pairs whose chosen answer is likelier: as a whole, and per token."""
    groups = [(g.prompt.tolist(), [c.ids.tolist() for c in g.completions]) for g in pairs]
    with torch.no_grad():
        scores = score_completions(trainer.model.eval(), groups)
    whole = [(c.sum() > r.sum()).item() for c, r in scores]
    per_token = [(c.mean() > r.mean()).item() for c, r in scores]
    return sum(whole) / len(whole), sum(per_token) / len(per_token)


untouched = BaseTrainer(configs["DPO"])
untouched.setup_model_and_tokenizer()
pairs = untouched.load_and_validate_dataset()["validation"]
results = {"untouched": accuracies(untouched, pairs)}
for name, config in configs.items():
    config.output_dir = str(output / name.lower())
    trainer = BaseTrainer(config)
    trainer.train()
    results[name] = accuracies(trainer, pairs)

print(f"{len(pairs)} held-out pairs\n\nmethod      likelier  per token")
for name, (whole, per_token) in results.items():
    print(f"{name:<10} {whole:9.3f}  {per_token:9.3f}")

figure = Figure(figsize=(7, 4), layout="constrained")
axes = figure.subplots()
positions = range(len(results))
axes.bar([p - 0.2 for p in positions], [r[0] for r in results.values()], 0.4, label="whole answer")
axes.bar([p + 0.2 for p in positions], [r[1] for r in results.values()], 0.4, label="per token")
axes.set_xticks(list(positions), list(results))
axes.set(ylabel="chosen answer likelier", ylim=(0, 1))
axes.legend()
figure.savefig(output / "comparison.png", dpi=120)
print(f"\nplot: {output / 'comparison.png'}")
