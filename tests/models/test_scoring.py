"""Packed, prompt-sharing passes against one sequence at a time."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from arabic_qwen.errors import ModelLoadError
from arabic_qwen.models.scoring import enable_packed_forward, score_completions
from arabic_qwen.packing.batch import pack
from arabic_qwen.packing.group import Completion, Group

VOCABULARY = 400

tokens = st.integers(0, VOCABULARY - 1)
groups = st.lists(
    st.tuples(
        st.lists(tokens, min_size=1, max_size=9),
        st.lists(st.lists(tokens, max_size=7), max_size=6),  # the chosen one and up to five negatives
    ),
    min_size=1,
    max_size=4,
)
EXAMPLE = [
    ([5, 6, 7], [[8, 9, 10], [11], []]),
    ([12], [[13, 14, 15, 16]]),
    ([17, 18], []),
    ([19] * 9, [[20, 21], [20, 22], [23, 24, 25, 26, 27]]),
]


def with_lora(model: torch.nn.Module) -> torch.nn.Module:
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)  # a new adapter's B is zero, which hides the gradient of A
    return adapted


def naive_scores(model: torch.nn.Module, given_groups) -> list[list[torch.Tensor]]:
    """One ordinary forward pass for each sequence."""
    scores = []
    for prompt, completions in given_groups:
        scores.append([])
        for ids in completions:
            logits = model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0].float()
            predicted = logits.log_softmax(-1)[len(prompt) - 1 : len(prompt) - 1 + len(ids)]
            scores[-1].append(predicted.gather(-1, torch.tensor(ids, dtype=torch.long)[:, None])[:, 0])
    return scores


def flat(scores: list[list[torch.Tensor]]) -> torch.Tensor:
    return torch.cat([torch.zeros(0), *(part for parts in scores for part in parts)])


def gradients(model: torch.nn.Module, logps: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of a sum with random weights."""
    model.zero_grad()
    weights = torch.randn(len(logps), generator=torch.Generator().manual_seed(2))
    (logps * weights).sum().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in trained.items()}


def assert_equal_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    total = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, gradient in expected.items():
        # The second term is for gradients that cancel out but for rounding, such as a query's on a single key:
        # there the ordinary pass is as far from float64 as this is.
        bound = 1e-5 * gradient.norm() + 3e-6 * total
        assert (found[name] - gradient).norm() <= bound, name


@pytest.fixture(params=["full", "full with checkpointing", "lora", "lora with checkpointing"])
def training(request) -> str:
    return request.param


@pytest.fixture
def model_pair(tiny_model, training):
    """kind, tied -> a model with the packed forward and an ordinary one with the same weights, in training mode."""

    def build(kind: str, tied: bool) -> tuple[torch.nn.Module, torch.nn.Module]:
        packed, plain = (tiny_model(kind, tied=tied) for _ in range(2))
        enable_packed_forward(packed)
        if "lora" in training:
            packed, plain = with_lora(packed), with_lora(plain)
        if "checkpointing" in training:
            packed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return packed.train(), plain.train()

    return build


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(given_groups=groups)
def test_equal_to_one_sequence_at_a_time(model_pair, kind, tied, given_groups):
    packed, plain = model_pair(kind, tied)
    scores, expected = score_completions(packed, given_groups), naive_scores(plain, given_groups)
    assert [[len(ids) for ids in completions] for _, completions in given_groups] == [
        [len(part) for part in parts] for parts in scores
    ]
    assert all(part.dtype == torch.float32 and part.dim() == 1 for parts in scores for part in parts)
    torch.testing.assert_close(flat(scores), flat(expected), rtol=1e-5, atol=1e-5)
    if len(flat(expected)):
        assert_equal_gradients(gradients(packed, flat(scores)), gradients(plain, flat(expected)))


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_token_budget_changes_nothing(tiny_model, kind):
    model = tiny_model(kind)
    enable_packed_forward(model)
    whole = flat(score_completions(model, EXAMPLE))
    expected = gradients(model, whole)
    for token_budget in (1, 8, 13, 20, 10_000):
        scores = flat(score_completions(model, EXAMPLE, token_budget=token_budget))
        torch.testing.assert_close(scores, whole, rtol=1e-5, atol=1e-5)
        assert_equal_gradients(gradients(model, scores), expected)


def test_groups_do_not_see_each_other(tiny_model):
    model = tiny_model()
    enable_packed_forward(model)
    alone = [score_completions(model, [group])[0] for group in EXAMPLE]
    torch.testing.assert_close(flat(score_completions(model, EXAMPLE)), flat(alone), rtol=1e-5, atol=1e-5)
    changed = [([300 + token for token in prompt], answers) for prompt, answers in EXAMPLE[1:]]
    first = score_completions(model, [EXAMPLE[0], *changed])[0]
    torch.testing.assert_close(flat([first]), flat([alone[0]]), rtol=1e-5, atol=1e-5)


def test_a_prompt_is_computed_once_for_all_its_completions(tiny_model):
    model = tiny_model()
    enable_packed_forward(model)
    seen = []
    model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    score_completions(model, [([1] * 9, [[2, 3], [4, 5, 6], []])])
    assert seen == [9 + 2 + 3]


def test_masked_targets_are_left_out(tiny_model):
    """A conversation of several turns is one completion; its user turns are context only."""
    model = tiny_model()
    enable_packed_forward(model)
    ids, targets = torch.arange(10, 20).numpy(), torch.tensor([1, 1, 0, 0, 1, 0, 1, 1, 1, 0]).bool().numpy()
    prompt = torch.arange(4).numpy()
    found = model(packed=pack([Group(prompt, (Completion(ids, targets),))]))
    ((whole,),) = naive_scores(tiny_model(), [(prompt.tolist(), [ids.tolist()])])
    torch.testing.assert_close(found, whole[torch.from_numpy(targets)], rtol=1e-5, atol=1e-5)


def test_no_gradients_under_no_grad(tiny_model):
    model = tiny_model()
    enable_packed_forward(model)
    with torch.no_grad():
        assert not flat(score_completions(model, EXAMPLE)).requires_grad


def test_disabled_adapters_give_the_reference(tiny_model):
    model = tiny_model()
    enable_packed_forward(model)
    adapted = with_lora(model)
    base = flat(naive_scores(tiny_model(), EXAMPLE))
    with adapted.disable_adapter():
        torch.testing.assert_close(flat(score_completions(adapted, EXAMPLE)), base, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(flat(score_completions(adapted, EXAMPLE)), base, atol=1e-2)


def test_no_groups(tiny_model):
    model = tiny_model()
    enable_packed_forward(model)
    assert score_completions(model, []) == []


def test_empty_prompt_is_refused(tiny_model):
    model = tiny_model()
    enable_packed_forward(model)
    with pytest.raises(ValueError, match=r"groups\[1\]: the prompt is empty"):
        score_completions(model, [([1], [[2]]), ([], [[3]])])


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_ordinary_passes_are_unchanged(tiny_model, kind):
    model, plain = tiny_model(kind), tiny_model(kind)
    enable_packed_forward(model)
    ids = torch.randint(3, VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # padded on the left
    mask[1, 5:] = 0  # and on the right
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    found, expected = model(**inputs), plain(**inputs)
    torch.testing.assert_close(found.logits[mask.bool()], expected.logits[mask.bool()])
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(model(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_generation_is_unchanged(tiny_model, kind, adapted):
    model, plain = tiny_model(kind), tiny_model(kind)
    enable_packed_forward(model)
    if adapted:
        model, plain = with_lora(model).eval(), with_lora(plain).eval()
    ids = torch.tensor([[0, 0, 9, 10], [11, 12, 13, 14]])
    options = {"attention_mask": (ids != 0).long(), "max_new_tokens": 12, "eos_token_id": None}
    for strategy in ({"do_sample": False}, {"num_beams": 2, "do_sample": False}):
        found = model.generate(input_ids=ids, **options, **strategy)
        assert found.shape == (2, 16)
        assert found.tolist() == plain.generate(input_ids=ids, **options, **strategy).tolist()


def test_enabling_twice_is_as_once(tiny_model):
    model = tiny_model()
    enable_packed_forward(model)
    once = flat(score_completions(model, EXAMPLE))
    enable_packed_forward(model)
    torch.testing.assert_close(flat(score_completions(model, EXAMPLE)), once, rtol=0, atol=0)


def test_a_copy_computes_with_its_own_weights(tiny_model):
    model = tiny_model()
    enable_packed_forward(model)
    before = flat(score_completions(model, EXAMPLE)).detach()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    torch.testing.assert_close(flat(score_completions(model, EXAMPLE)), before)
    assert not torch.allclose(flat(score_completions(twin, EXAMPLE)), before, atol=1e-2)


def test_sliding_windows_are_refused(tiny_model):
    model = tiny_model("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1)
    with pytest.raises(ModelLoadError, match="attention layers other than full attention"):
        enable_packed_forward(model)


def test_saved_model_has_no_trace_of_the_attention(tiny_model, tmp_path):
    model = tiny_model()
    enable_packed_forward(model)
    model.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text(encoding="utf-8")
    assert "arabic_qwen" not in config
    assert "attn_implementation" not in config
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"
    ids = torch.arange(3, 12)[None]
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
