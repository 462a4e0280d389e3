"""TRL 1.16's own loss code, run on chosen log-probabilities: trainers without __init__, models that only answer."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from trl import DPOTrainer, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

ACCELERATOR = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)


def bare(trainer_class: type, **attributes: Any) -> Any:
    trainer = object.__new__(trainer_class)
    trainer.__dict__.update(
        accelerator=ACCELERATOR,
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        is_encoder_decoder=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        **attributes,
    )
    return trainer


def completions(lengths: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Token log-probabilities [rows, longest], a leaf of the graph, and the mask of those that count."""
    generator = torch.Generator().manual_seed(seed)
    logps = -3 * torch.rand(len(lengths), max(lengths), generator=generator)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return (logps * mask).requires_grad_(), mask


def _inputs(mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Rows of a one-token prompt and the completion."""
    completion_mask = torch.nn.functional.pad(mask.long(), (1, 0))
    return {
        "input_ids": torch.zeros_like(completion_mask),
        "attention_mask": torch.ones_like(completion_mask),
        "completion_mask": completion_mask,
    }


def _outputs(logps: torch.Tensor, mask: torch.Tensor) -> SimpleNamespace:
    zeros = torch.zeros_like(logps)
    return SimpleNamespace(log_probs=logps * mask, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


def dpo(
    loss_type: str,
    logps: torch.Tensor,
    mask: torch.Tensor,
    reference: torch.Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    discopop_tau: float = 0.05,
) -> torch.Tensor:
    """DPOTrainer.compute_loss of rows [2N]: N chosen, then N rejected. Scalar."""
    trainer = bare(
        DPOTrainer,
        args=SimpleNamespace(discopop_tau=discopop_tau),
        beta=beta,
        label_smoothing=label_smoothing,
        loss_types=[loss_type],
        loss_weights=[1.0],
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        use_weighting=False,
    )
    reference_chosen, reference_rejected = reference.chunk(2)
    inputs = {**_inputs(mask), "ref_chosen_logps": reference_chosen, "ref_rejected_logps": reference_rejected}
    return trainer.compute_loss(lambda **kwargs: _outputs(logps, mask), inputs)


def kto(
    logps: torch.Tensor,
    mask: torch.Tensor,
    reference: torch.Tensor,
    label: torch.Tensor,
    policy_kl: torch.Tensor,
    reference_kl: torch.Tensor,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> tuple[torch.Tensor, float]:
    """KTOTrainer.compute_loss, and its z. `policy_kl` are sums over completions of one token."""
    trainer = bare(
        KTOTrainer,
        args=SimpleNamespace(max_length=None),
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
        loss_type="kto",
        calculate_KL=True,
        precompute_ref_logps=True,
    )
    kl_mask = torch.ones(len(policy_kl), 1)
    inputs = {**_inputs(mask), "label": label, "ref_logps": reference, "ref_KL_logps": reference_kl}
    inputs |= {f"KL_{name}": value for name, value in _inputs(kl_mask).items()}
    inputs["KL_input_ids"] += 1  # how the model knows them

    def model(input_ids: torch.Tensor, **kwargs: Any) -> SimpleNamespace:
        return _outputs(policy_kl[:, None], kl_mask) if input_ids.any() else _outputs(logps, mask)

    loss = trainer.compute_loss(model, inputs)
    return loss, trainer._metrics["train"]["kl"][-1]


def cpo_trainer(
    loss_type: str, *, beta: float, cpo_alpha: float = 0.0, simpo_gamma: float = 1.0, label_smoothing: float = 0.0
) -> Any:
    return bare(
        CPOTrainer,
        loss_type=loss_type,
        beta=beta,
        cpo_alpha=cpo_alpha,
        simpo_gamma=simpo_gamma,
        label_smoothing=label_smoothing,
        alpha=0.0,
        pad_token_id=0,
    )


def orpo_trainer(*, beta: float) -> Any:
    return bare(ORPOTrainer, beta=beta, padding_value=0)


class PairLogits:
    """Random logits of N chosen and N rejected completions after one-token prompts, as CPO and ORPO trainers take them.

    Attributes:
        logits: [2N, longest + 1, vocabulary], a leaf of the graph.
        loss: of the trainer passed, prompts excepted; scalar.
        logps, lengths: [2N] sums over the completions, and their tokens.
    """

    def __init__(self, lengths: list[int], vocabulary: int = 6, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        mask = torch.nn.functional.pad(torch.arange(max(lengths)) < torch.tensor(lengths)[:, None], (1, 0))
        size = (len(lengths), max(lengths) + 1)
        self.logits = torch.randn(*size, vocabulary, generator=generator).mul_(2).requires_grad_()
        self.ids = torch.randint(vocabulary, size, generator=generator)
        self.mask = mask
        self.attention_mask = mask.long()
        self.attention_mask[:, 0] = 1
        self.lengths = torch.tensor(lengths)

    @property
    def logps(self) -> torch.Tensor:
        logps = self.logits[:, :-1].log_softmax(-1).gather(-1, self.ids[:, 1:, None])[..., 0]
        return (logps * self.mask[:, 1:]).sum(1)

    def loss(self, trainer: Any) -> torch.Tensor:
        batch = {}
        for name, value in [
            ("input_ids", self.ids),
            ("attention_mask", self.attention_mask),
            ("labels", self.ids.masked_fill(~self.mask, -100)),
        ]:
            batch[f"chosen_{name}"], batch[f"rejected_{name}"] = value.chunk(2)
        model = lambda *args, **kwargs: SimpleNamespace(logits=self.logits)  # noqa: E731
        return trainer.get_batch_loss_metrics(model, batch)[0]
