"""Direct preference optimisation from Python: train, evaluate, compare with the model before.

python examples/dpo_training.py                                # the tiny model and sample data that come along
python examples/dpo_training.py Qwen/Qwen2.5-7B my_pairs.jsonl # yours; the model may be an earlier output
"""

import sys

from arabic_qwen.config import DPOConfig
from arabic_qwen.training.dpo_trainer import create_dpo_trainer

model = sys.argv[1] if len(sys.argv) > 1 else "arabic-qwen-tiny"
data = sys.argv[2] if len(sys.argv) > 2 else "sample:dpo"

config = DPOConfig(
    model_name=model,
    dataset_path=data,
    output_dir="./checkpoints/dpo_example",
    instruction_template="tokenizer",
    lora_target_modules="all-linear",
    learning_rate=5e-4 if model == "arabic-qwen-tiny" else 5e-6,
)
trainer = create_dpo_trainer(config)
trainer.train()

print(trainer.evaluate())
print(trainer.generate_comparison("ما عاصمة المغرب؟", max_length=32, do_sample=False))
