"""Supervised fine-tuning from Python: train, evaluate, answer.

python examples/sft_training.py                                # the tiny model and sample data that come along
python examples/sft_training.py Qwen/Qwen2.5-7B my_data.jsonl  # yours
"""

import sys

from arabic_qwen.config import SFTConfig
from arabic_qwen.training.sft_trainer import create_sft_trainer

model = sys.argv[1] if len(sys.argv) > 1 else "arabic-qwen-tiny"
data = sys.argv[2] if len(sys.argv) > 2 else "sample:sft"
tiny = model == "arabic-qwen-tiny"

config = SFTConfig(
    model_name=model,
    dataset_path=data,
    output_dir="./checkpoints/sft_example",
    instruction_template="tokenizer",
    lora_target_modules="all-linear",
    learning_rate=1e-3 if tiny else 2e-4,
    num_train_epochs=3,
)
trainer = create_sft_trainer(config)
trainer.train()

print(trainer.evaluate())
for question in ("ما عاصمة الأردن؟", "ما جمع كلمة كتاب؟"):
    print(question, trainer.generate_response(question, max_length=48, do_sample=False))
