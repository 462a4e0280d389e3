"""KTO, IPO and CPO on the tiny model and the sample data that come along.

python examples/preference_training.py
"""

from arabic_qwen.config import CPOConfig, IPOConfig, KTOConfig
from arabic_qwen.training.preference_trainer import create_cpo_trainer, create_ipo_trainer, create_kto_trainer

common = dict(
    model_name="arabic-qwen-tiny",
    instruction_template="tokenizer",
    lora_target_modules="all-linear",
    per_device_train_batch_size=8,
    learning_rate=5e-4,
)

trainers = {
    "kto": create_kto_trainer(KTOConfig(dataset_path="sample:kto", **common)),
    "ipo": create_ipo_trainer(IPOConfig(dataset_path="sample:dpo", **common)),
    "cpo": create_cpo_trainer(CPOConfig(dataset_path="sample:dpo", **common)),
}
for name, trainer in trainers.items():
    trainer.train()
    print(name, {metric: round(value, 3) for metric, value in trainer.metrics.items()})
