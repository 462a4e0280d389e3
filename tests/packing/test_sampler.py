"""Which sequences make each step."""

import pytest

from arabic_qwen.packing.sampler import StepSampler

pytestmark = pytest.mark.engine


def test_sampler_shows_every_sequence_once_to_some_rank():
    class Args:
        train_sampling_strategy, seed, data_seed, world_size = "random", 1, None, 3
        per_device_train_batch_size, gradient_accumulation_steps = 2, 2

    seen = []
    for rank in range(3):
        Args.process_index = rank
        sampler = StepSampler(Args, [1] * 31, [True] * 31, epoch=lambda: 0)
        batches = list(sampler)
        assert len(batches) == len(sampler) == 6  # 31 sequences: two steps of 12 in two slots each, one of 7 in two
        assert [len(b) for b in batches[::2]] == [0, 0, 0]
        seen += [index for batch in batches for index in batch]
    assert sorted(seen) == list(range(31))


def test_epochs_are_shuffled_differently_and_seeded():
    class Args:
        train_sampling_strategy, seed, data_seed, world_size, process_index = "random", 1, 7, 1, 0
        per_device_train_batch_size, gradient_accumulation_steps = 2, 1

    def order(epoch):
        return StepSampler(Args, [1] * 20, [True] * 20, epoch=lambda: epoch).order()

    assert order(0) == order(0) != order(1)
    Args.train_sampling_strategy = "group_by_length"
    lengths = [i % 5 for i in range(400)]
    grouped = list(StepSampler(Args, lengths, [True] * 400, epoch=lambda: 0))
    assert sum(lengths[a] == lengths[b] for a, b in grouped) > 150


def test_every_step_has_its_share_of_both_classes():
    class Args:
        train_sampling_strategy, seed, data_seed, world_size, process_index = "random", 1, None, 1, 0
        per_device_train_batch_size, gradient_accumulation_steps = 4, 2

    desirable = [i % 4 == 0 for i in range(64)]  # a quarter is desirable
    for strategy in ("random", "group_by_length"):
        Args.train_sampling_strategy = strategy
        steps = [batch for batch in StepSampler(Args, [1] * 64, desirable, epoch=lambda: 3) if batch]
        assert [sum(desirable[i] for i in step) for step in steps] == [2] * 8
        assert steps[0] != sorted(steps[0])
