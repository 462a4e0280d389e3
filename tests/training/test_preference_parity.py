"""Whole optimizer steps against TRL 1.16: same model, same adapters, same token ids in the same order."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from arabic_qwen.models.adapters import add_lora
from arabic_qwen.packing.group import Completion, Group
from arabic_qwen.training.base_trainer import BaseTrainer
from tests.preference_runs import (
    logp,
    losses,
    naive_loss,
    preference_config,
    ready,
    relative_difference,
    run,
    trainable,
    write_data,
)

pytestmark = pytest.mark.engine

STEPS = 5


@pytest.fixture
def preference_file(tmp_path):
    return write_data("dpo", tmp_path)


@pytest.fixture
def feedback_file(tmp_path):
    return write_data("kto", tmp_path)


def fresh_model(config):
    """The policy before the first step, without packed attention."""
    return add_lora(AutoModelForCausalLM.from_pretrained(config.model_name, dtype=torch.float32), config)


def in_training_order(trainer: BaseTrainer, steps: int = STEPS) -> list[Group]:
    """The groups of the first steps, epoch by epoch, each step's one after the other."""
    loader = trainer.trainer.get_train_dataloader()
    groups = []
    trainer.trainer.state.epoch = 0
    while len(groups) < steps * 4:
        groups += [group for index in loader.batch_sampler.order() for group in loader.dataset[index]]
        trainer.trainer.state.epoch += 1
    return groups[: steps * 4]


def train_peer(trainer_class, args_class, config, output_dir, rows, tokenizer, expected, **values):
    """Trains TRL's on the rows in order; its trained weights and losses. `expected`: the token ids that it must see."""
    args = args_class(
        output_dir=str(output_dir),
        per_device_train_batch_size=4,
        max_steps=STEPS,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        train_sampling_strategy="sequential",
        max_length=config.max_seq_length,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        **values,
    )
    peer = trainer_class(
        model=fresh_model(config), args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    assert [{name: row[name] for name in wanted} for row, wanted in zip(peer.train_dataset, expected, strict=True)] == (
        expected
    )
    peer.train()
    theirs = {name: p.detach() for name, p in peer.model.named_parameters() if p.requires_grad}
    return theirs, [entry["loss"] for entry in peer.state.log_history if "loss" in entry]


def as_text(tokenizer, ids) -> str:
    text = tokenizer.decode(ids)
    assert tokenizer(text, add_special_tokens=False).input_ids == list(ids)
    return text


def pair_rows(tokenizer, groups) -> list[dict]:
    """TRL tokenises prompt and answer as one text; `train_peer` checks that it finds our ids."""
    return [
        {
            "prompt": as_text(tokenizer, group.prompt),
            "chosen": as_text(tokenizer, group.completions[0].ids),
            "rejected": as_text(tokenizer, group.completions[1].ids),
        }
        for group in groups
    ]


def whole(group: Group, number: int) -> dict:
    prompt, ids = group.prompt.tolist(), group.completions[number].ids.tolist()
    return {"input_ids": prompt + ids, "labels": [-100] * len(prompt) + ids}


def agree(ours, our_losses, theirs, their_losses, start):
    assert ours.keys() == theirs.keys() == start.keys()
    assert len(our_losses) == STEPS
    assert our_losses == pytest.approx(their_losses, abs=1e-4)
    assert relative_difference(ours, theirs, start) < 1e-3


@pytest.mark.parametrize(
    ("method", "ours", "theirs"),
    [
        ("dpo", {}, {"loss_type": "sigmoid"}),
        ("dpo", {"loss_type": "hinge"}, {"loss_type": "hinge"}),
        ("dpo", {"loss_type": "aot"}, {"loss_type": "aot"}),  # needs the step's log-probabilities at once
        ("dpo", {"loss_type": "sft"}, {"loss_type": "sft"}),
        ("ipo", {"tau": 0.5}, {"loss_type": "ipo", "beta": 0.5}),  # TRL's beta is the paper's tau
    ],
    ids=["dpo", "hinge", "aot", "sft", "ipo"],
)
def test_dpo_and_ipo_steps_equal_trl(method, ours, theirs, model_dir, preference_file, tmp_path):
    import trl

    config = preference_config(method, model_dir, preference_file, tmp_path / "ours", max_steps=STEPS, **ours)
    weights, trainer = run(config)
    groups = in_training_order(trainer)
    expected = [
        {
            "prompt_ids": group.prompt.tolist(),
            "chosen_ids": group.completions[0].ids.tolist(),
            "rejected_ids": group.completions[1].ids.tolist(),
        }
        for group in groups
    ]
    peer = train_peer(
        trl.DPOTrainer,
        trl.DPOConfig,
        config,
        tmp_path / "trl",
        pair_rows(trainer.tokenizer, groups),
        trainer.tokenizer,
        expected,
        **({"beta": config.beta} | theirs),
    )
    agree(weights, losses(trainer), *peer, trainable(fresh_model(config)))


@pytest.mark.parametrize(
    ("method", "ours", "theirs"),
    [
        ("cpo", {"beta": 0.3, "cpo_alpha": 0.7}, {"beta": 0.3, "cpo_alpha": 0.7}),
        ("cpo", {"loss_type": "hinge"}, {"loss_type": "hinge"}),
        # γ = beta · gamma_beta_ratio
        (
            "simpo",
            {"beta": 2.0, "gamma_beta_ratio": 0.25},
            {"beta": 2.0, "loss_type": "simpo", "simpo_gamma": 0.5, "cpo_alpha": 0.0},
        ),
    ],
    ids=["cpo", "hinge", "simpo"],
)
def test_cpo_and_simpo_steps_equal_trl(method, ours, theirs, model_dir, preference_file, tmp_path):
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    config = preference_config(method, model_dir, preference_file, tmp_path / "ours", max_steps=STEPS, **ours)
    weights, trainer = run(config)
    groups = in_training_order(trainer)
    expected = [
        {f"{name}_{key}": value for i, name in enumerate(("chosen", "rejected")) for key, value in whole(g, i).items()}
        for g in groups
    ]
    peer = train_peer(
        CPOTrainer,
        CPOConfig,
        config,
        tmp_path / "trl",
        pair_rows(trainer.tokenizer, groups),
        trainer.tokenizer,
        expected,
        **theirs,
    )
    agree(weights, losses(trainer), *peer, trainable(fresh_model(config)))


def test_kto_steps_equal_trl(model_dir, feedback_file, tmp_path):
    """TRL pairs each prompt with the completion before it in its batch; ours are given the same ones."""
    import trl

    config = preference_config(
        "kto",
        model_dir,
        feedback_file,
        tmp_path / "ours",
        max_steps=STEPS,
        beta=0.5,
        desirable_weight=1.5,
        undesirable_weight=0.75,
    )
    trainer = ready(config, seed=None)
    groups = trainer.dataset["train"].groups
    order = trainer.trainer.get_train_dataloader().batch_sampler.order()
    for start in range(0, len(order), 4):
        batch = order[start : start + 4]
        for place, index in enumerate(batch):
            groups[index] = groups[index]._replace(auxiliary=(groups[batch[place - 1]].completions[0],))
    start = trainable(trainer.model)
    trainer.trainer.train()

    groups = in_training_order(trainer)
    rows, expected = [], []
    for group in groups:
        ids = group.completions[0].ids
        prompt, completion = (as_text(trainer.tokenizer, part) for part in (group.prompt, ids))
        rows.append({"prompt": prompt, "completion": completion, "label": group.desirable})
        expected.append(
            {
                "prompt_ids": group.prompt.tolist(),
                "completion_ids": ids.tolist(),
                "KL_completion_ids": group.auxiliary[0].ids.tolist(),
                "label": group.desirable,
            }
        )
    peer = train_peer(
        trl.KTOTrainer,
        trl.KTOConfig,
        config,
        tmp_path / "trl",
        rows,
        trainer.tokenizer,
        expected,
        beta=0.5,
        desirable_weight=1.5,
        undesirable_weight=0.75,
    )
    agree(trainable(trainer.model), losses(trainer), *peer, start)


def test_orpo_steps_equal_trl(model_dir, preference_file, tmp_path):
    """TRL's NLL counts the prompt's tokens but the first, which nothing predicts: prompts of one token have no others."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    class Tokenised(ORPOTrainer):
        def tokenize_row(self, feature, model=None):
            return feature

    config = preference_config("orpo", model_dir, preference_file, tmp_path / "ours", max_steps=STEPS, beta=0.3)
    trainer = ready(config, seed=None)
    trainer.dataset["train"].groups[:] = [g._replace(prompt=g.prompt[:1]) for g in trainer.dataset["train"].groups]
    start = trainable(trainer.model)
    trainer.trainer.train()
    rows = []
    for group in in_training_order(trainer):
        row = {"prompt": "", "chosen": "", "rejected": ""}  # must be there, though nothing reads them
        for number, name in enumerate(("chosen", "rejected")):
            row |= {f"{name}_{key}": value for key, value in whole(group, number).items()}
            row[f"{name}_attention_mask"] = [1] * len(row[f"{name}_input_ids"])
        rows.append(row)
    expected = [{"chosen_input_ids": row["chosen_input_ids"]} for row in rows]
    peer = train_peer(
        Tokenised, ORPOConfig, config, tmp_path / "trl", rows, trainer.tokenizer, expected, beta=config.beta
    )
    agree(trainable(trainer.model), losses(trainer), *peer, start)


def test_orpo_steps_equal_one_sequence_at_a_time(model_dir, preference_file, tmp_path):
    """With prompts of any length: the paper's eq. 6 does not count their tokens in the NLL, as TRL does."""
    config = preference_config("orpo", model_dir, preference_file, tmp_path / "ours", max_steps=STEPS, beta=0.3)
    weights, trainer = run(config)
    groups = in_training_order(trainer)

    model = fresh_model(config)
    start = trainable(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=config.weight_decay)
    their_losses = []
    for step in range(STEPS):
        loss = naive_loss(config, model, groups[4 * step : 4 * step + 4])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        their_losses.append(loss.item())
    agree(weights, losses(trainer), trainable(model), their_losses, start)


def test_the_peers_log_probabilities_are_ours(model_dir, preference_file, tmp_path):
    """Guards the comparison itself: a completion's log-probability in one plain forward pass and in the packed one."""
    trainer = ready(preference_config("dpo", model_dir, preference_file, tmp_path))
    group = trainer.dataset["train"].groups[0]
    assert isinstance(group.completions[0], Completion)
    engine = trainer.trainer
    step = engine._collate([[group]])
    with torch.no_grad():
        scores = engine._score(trainer.model.eval(), step.batches[0], 1.0)
        plain = [logp(trainer.model, group, completion).item() for completion in group.completions]
    assert scores.policy.tolist() == pytest.approx(plain, abs=1e-4)
