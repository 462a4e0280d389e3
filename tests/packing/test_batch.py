import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arabic_qwen.packing.batch import pack
from arabic_qwen.packing.bins import best_fit_decreasing, micro_batches
from arabic_qwen.packing.group import Completion, Group

pytestmark = pytest.mark.engine


def naive_best_fit_decreasing(lengths: list[int], capacity: int) -> int:
    """Number of bins, by looking at every bin for each item."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda i: rooms[i])] -= length
        else:
            rooms.append(max(capacity, length) - length)
    return len(rooms)


lengths_and_capacity = st.tuples(st.lists(st.integers(0, 40), max_size=60), st.integers(1, 50))


@given(lengths_and_capacity)
def test_every_item_is_in_one_bin(case):
    lengths, capacity = case
    bins = best_fit_decreasing(lengths, capacity)
    assert sorted(item for members in bins for item in members) == list(range(len(lengths)))
    assert all(bins)


@given(lengths_and_capacity)
def test_capacity_is_kept(case):
    lengths, capacity = case
    for members in best_fit_decreasing(lengths, capacity):
        positive = [lengths[i] for i in members if lengths[i]]
        assert sum(positive) <= capacity or len(positive) == 1


@given(lengths_and_capacity)
def test_bins_are_as_few_as_those_of_the_naive_algorithm(case):
    lengths, capacity = case
    bins = len(best_fit_decreasing(lengths, capacity))
    assert bins == naive_best_fit_decreasing(lengths, capacity)
    fitting = [length for length in lengths if length <= capacity]
    oversized = len(lengths) - len(fitting)
    # Of any two bins neither would have been opened if the other had had room.
    assert bins <= oversized + max(1, 2 * sum(fitting) / capacity)


def test_best_fit_is_deterministic_and_keeps_the_order_of_equal_items():
    assert best_fit_decreasing([5, 5, 5, 5], 10) == [[0, 1], [2, 3]]
    assert best_fit_decreasing([3, 9, 4, 3, 1], 10) == [[1, 4], [2, 0, 3]]
    assert best_fit_decreasing([], 10) == []


tokens = st.integers(0, 99)


@st.composite
def completions(draw):
    ids = draw(st.lists(tokens, max_size=6))
    targets = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    return Completion(np.array(ids, dtype=np.int32), np.array(targets, dtype=bool), draw(st.booleans()))


groups = st.lists(
    st.builds(
        Group,
        st.lists(tokens, min_size=1, max_size=6).map(lambda ids: np.array(ids, dtype=np.int32)),
        st.lists(completions(), max_size=4).map(tuple),
        auxiliary=st.just(()),
        reference=st.none(),
        lengths=st.none(),
        tag=st.integers(0, 5),
    ),
    min_size=1,
    max_size=5,
)


@given(groups)
def test_stream_is_the_groups_end_to_end(given_groups):
    batch = pack(given_groups)
    ids, positions = [], []
    for prompt, answers, *_ in given_groups:
        ids += prompt.tolist()
        positions += range(len(prompt))
        for answer in answers:
            ids += answer.ids.tolist()
            positions += range(len(prompt), len(prompt) + len(answer.ids))
    assert batch.input_ids.tolist() == ids
    assert batch.position_ids.tolist() == positions
    assert len(ids) == sum(group.num_tokens for group in given_groups)
    for tensor in (batch.input_ids, batch.position_ids, batch.target_index, batch.target_ids, batch.target_completion):
        assert tensor.dtype == torch.int64
        assert tensor.dim() == 1


@given(groups)
def test_targets_equal_those_of_single_sequences(given_groups):
    """Each target is predicted at the stream position of the token before it in [prompt; completion]."""
    batch = pack(given_groups)
    expected = []
    start = number = 0
    for prompt, answers, *_ in given_groups:
        prompt_places = list(range(start, start + len(prompt)))
        start += len(prompt)
        for answer in answers:
            places = prompt_places + list(range(start, start + len(answer.ids)))
            start += len(answer.ids)
            for i, (token, is_target) in enumerate(zip(answer.ids, answer.targets, strict=True)):
                if is_target:
                    expected.append((places[len(prompt) + i - 1], int(token), number))
            number += 1
    found = zip(batch.target_index.tolist(), batch.target_ids.tolist(), batch.target_completion.tolist(), strict=True)
    assert list(found) == expected
    assert batch.num_completions == number


@given(groups)
def test_each_token_attends_to_its_own_sequence(given_groups):
    """Bottom-right causal attention over the segments shows each token its prompt and completion up to itself."""
    batch = pack(given_groups)
    expected = {}
    start = 0
    for prompt, answers, *_ in given_groups:
        prompt_places = list(range(start, start + len(prompt)))
        for i, place in enumerate(prompt_places):
            expected[place] = prompt_places[: i + 1]
        start += len(prompt)
        for answer in answers:
            own = list(range(start, start + len(answer.ids)))
            for i, place in enumerate(own):
                expected[place] = prompt_places + own[: i + 1]
            start += len(answer.ids)

    keys = list(range(start)) if batch.kv_index is None else batch.kv_index.tolist()
    assert batch.cu_seqlens_q.tolist() == np.cumsum([0, *batch.query_lengths]).tolist()
    assert batch.cu_seqlens_k.tolist() == np.cumsum([0, *batch.key_lengths]).tolist()
    assert batch.cu_seqlens_q.dtype == batch.cu_seqlens_k.dtype == torch.int32
    assert sum(batch.query_lengths) == start
    assert sum(batch.key_lengths) == len(keys)
    assert all(length > 0 for length in batch.query_lengths)
    seen = {}
    query = key = 0
    for num_queries, num_keys in zip(batch.query_lengths, batch.key_lengths, strict=True):
        for i in range(num_queries):
            seen[query + i] = keys[key : key + num_keys - num_queries + i + 1]
        query, key = query + num_queries, key + num_keys
    assert seen == expected


def test_single_completions_need_no_gathered_keys():
    prompt, ids = np.array([1, 2], dtype=np.int32), np.array([3], dtype=np.int32)
    group = Group(prompt, (Completion(ids, np.array([True])),))
    batch = pack([group, group])
    assert batch.kv_index is None
    assert batch.query_lengths == [3, 3]


@given(groups, st.integers(1, 40))
def test_micro_batches_hold_every_group_once(given_groups, token_budget):
    numbered = [
        Group(np.append(group.prompt, np.int32(1000 + i)), group.completions) for i, group in enumerate(given_groups)
    ]
    batches = [pack(members) for members in micro_batches(numbered, token_budget)]
    found = [int(token) for batch in batches for token in batch.input_ids if token >= 1000]
    assert sorted(found) == [1000 + i for i in range(len(numbered))]
    for batch in batches:
        members = [int(token) for token in batch.input_ids if token >= 1000]
        assert members == sorted(members)
        assert len(batch.input_ids) == sum(numbered[i - 1000].num_tokens for i in members)
        assert len(batch.input_ids) <= token_budget or len(members) == 1
    assert len(batches) == len(best_fit_decreasing([group.num_tokens for group in numbered], token_budget))
    assert sum(len(batch.target_ids) for batch in batches) == sum(
        int(answer.targets.sum()) for group in numbered for answer in group.completions
    )


def test_a_long_group_does_not_keep_the_others_from_being_even():
    groups = [Group(np.zeros(length, dtype=np.int32), ()) for length in [9000] + [500] * 20]
    sums = [sum(group.num_tokens for group in batch) for batch in micro_batches(groups, 8192)]
    assert sorted(sums) == [5000, 5000, 9000]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(40, 200))
def test_micro_batches_are_about_equally_large(lengths, token_budget):
    batches = micro_batches([Group(np.zeros(length, dtype=np.int32), ()) for length in lengths], token_budget)
    sums = [sum(group.num_tokens for group in batch) for batch in batches]
    bins = [sum(lengths[i] for i in members) for members in best_fit_decreasing(lengths, token_budget)]
    assert max(sums) - min(sums) <= max(max(lengths), max(bins) - min(bins))
    room = token_budget - sum(lengths) / len(batches)
    if room >= max(lengths):  # the last item of the largest was put where there was least
        assert max(sums) - min(sums) <= max(lengths)


def test_moving_a_batch_keeps_all_of_it():
    prompt, ids = np.array([1, 2], dtype=np.int32), np.array([3], dtype=np.int32)
    batch = pack([Group(prompt, (Completion(ids, np.array([True])),) * 2)])
    moved = batch.to("cpu")
    assert moved is not batch
    for name, value in vars(batch).items():
        other = getattr(moved, name)
        assert torch.equal(other, value) if isinstance(value, torch.Tensor) else other == value


@pytest.mark.parametrize("wrong", [[], [Group(np.array([], dtype=np.int32), ())]])
def test_nothing_to_pack_is_a_programming_error(wrong):
    with pytest.raises(AssertionError):
        pack(wrong)
