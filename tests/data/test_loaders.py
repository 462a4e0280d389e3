import json
import logging
import re
from pathlib import Path

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arabic_qwen.config import SFTConfig
from arabic_qwen.data import loaders
from arabic_qwen.data.dataset import GroupDataset
from arabic_qwen.data.loaders import DataLoader, split_rows, to_padded
from arabic_qwen.data.readers import Row, read_file
from arabic_qwen.data.sources import data_seed
from arabic_qwen.data.templates import set_template
from arabic_qwen.errors import ConfigurationError, DatasetError
from arabic_qwen.methods.registry import METHODS


@pytest.fixture
def loader(tokenizer, sft_file, tmp_path):
    """Configuration values -> a loader of `sft_file` with the ChatML template."""
    set_template(tokenizer, "chatml", "")

    def build(**values) -> DataLoader:
        return METHODS["sft"].data_loader(
            SFTConfig(**({"dataset_path": sft_file, "output_dir": tmp_path / "run"} | values)), tokenizer
        )

    return build


@pytest.fixture
def write(tmp_path):
    """Rows -> a JSON Lines file."""

    def write(rows: list[dict], name: str = "rows.jsonl") -> Path:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
        return tmp_path / name

    return write


def texts(loader: DataLoader, dataset: GroupDataset) -> list[str]:
    return [loader.tokenizer.decode([*group.prompt, *group.completions[0].ids]) for group in dataset]


def row(question: str = "سؤال", answer: str = "جواب") -> dict:
    return {"instruction": question, "response": answer}


class TestSplit:
    def test_sizes(self, loader):
        splits = loader(validation_split=0.25).load()
        assert {name: len(split) for name, split in splits.items()} == {"train": 9, "validation": 3}

    def test_train_and_validation_are_disjoint_and_complete(self, loader):
        some = loader(validation_split=0.5)
        splits = some.load()
        train, validation = texts(some, splits["train"]), texts(some, splits["validation"])
        whole = texts(some, some.encode(some.config.dataset_path))
        assert not set(train) & set(validation)
        assert sorted(train + validation) == sorted(whole)
        assert train == [text for text in whole if text in train]  # in file order

    def test_is_stable_and_chosen_by_data_seed(self, loader):
        def validation(**values) -> list[str]:
            some = loader(validation_split=0.5, **values)
            return texts(some, some.load()["validation"])

        assert validation() == validation(seed=7, learning_rate=1e-5)
        assert validation() != validation(data_seed=7)
        assert validation(data_seed=None, seed=7) == validation(data_seed=7)

    def test_without_validation_rows(self, loader):
        assert set(loader(validation_split=0).load()) == {"train"}

    def test_validation_file(self, loader, write):
        some = loader(eval_dataset_path=write([row("س", "ج")]), validation_split=0.5)
        splits = some.load()
        assert len(splits["train"]) == 12
        assert texts(some, splits["validation"]) == [
            "<|im_start|>user\nس<|im_end|>\n<|im_start|>assistant\nج<|im_end|>"
        ]

    def test_nothing_left_to_train_on(self, loader, write):
        with pytest.raises(
            ConfigurationError, match=re.escape("validation_split: 0.1 of 1 different rows leaves none")
        ):
            loader(dataset_path=write([row()])).load()

    @given(st.integers(2, 60), st.floats(0.001, 0.6), st.integers(0, 9))
    def test_any_share(self, size, share, seed):
        rows = [Row(f"file:{i}", {"n": i}) for i in range(size)]
        if max(1, round(size * share)) >= size:
            return
        train, validation = split_rows(rows, share, seed, [row.where for row in rows])
        assert len(validation) == max(1, round(size * share))
        assert sorted(train + validation, key=lambda r: r.values["n"]) == rows
        assert train == sorted(train, key=lambda r: r.values["n"])
        assert validation == sorted(validation, key=lambda r: r.values["n"])
        assert split_rows(rows, share, seed, [row.where for row in rows]) == (train, validation)

    def test_rows_of_one_key_stay_together(self):
        rows = [Row(f"file:{i}", {"n": i}) for i in range(40)]
        keys = [str(i // 4) for i in range(40)]
        train, validation = split_rows(rows, 0.3, 0, keys)
        assert len(validation) == 12
        assert not {row.values["n"] // 4 for row in train} & {row.values["n"] // 4 for row in validation}

    def test_data_seed(self):
        assert data_seed(SFTConfig(seed=1, data_seed=2)) == 2
        assert data_seed(SFTConfig(seed=1, data_seed=0)) == 0
        assert data_seed(SFTConfig(seed=1, data_seed=None)) == 1


class TestEncode:
    def test_sources_of_rows_are_equal(self, loader, sft_file):
        some = loader()
        from_path = texts(some, some.encode(sft_file))
        rows = list(read_file(sft_file))
        assert len(from_path) == 12
        assert texts(some, some.encode(str(sft_file))) == from_path
        assert texts(some, some.encode(rows)) == from_path
        assert texts(some, some.encode(r.values for r in rows)) == from_path
        assert texts(some, some.encode(datasets.Dataset.from_list([r.values for r in rows]))) == from_path

    def test_rows_of_different_layouts(self, loader):
        some = loader()
        messages = [{"role": "user", "content": "أ"}, {"role": "assistant", "content": "ب"}]
        layouts = [
            {"instruction": "أ", "response": "ب"},
            {"instruction": "أ", "input": "", "output": "ب"},
            {"prompt": "أ", "completion": "ب"},
            {"messages": messages},
            {"conversations": [{"from": "human", "value": "أ"}, {"from": "gpt", "value": "ب"}]},
        ]
        assert len(set(texts(some, some.encode(layouts)))) == 1

    def test_system_prompt_of_the_configuration(self, loader):
        some = loader(system_prompt="أجب بالعربية.")
        (text,) = texts(some, some.encode([row()]))
        assert text.startswith("<|im_start|>system\nأجب بالعربية.<|im_end|>\n")

    def test_no_rows(self, loader):
        assert len(loader().encode([])) == 0

    def test_chunks_change_nothing(self, loader, sft_file, monkeypatch):
        some = loader()
        whole = texts(some, some.encode(sft_file))
        monkeypatch.setattr(loaders, "_CHUNK", 5)
        assert texts(some, some.encode(sft_file)) == whole

    def test_past_turns_that_are_examples_of_their_own(self, loader):
        some = loader()
        some.tokenizer.chat_template = some.tokenizer.chat_template.replace(
            "message['content']",
            "message['content'] + ('~' if message['role'] == 'assistant' and not loop.last else '')",
        )
        messages = [{"role": r, "content": c} for r, c in zip(["user", "assistant"] * 2, "أبجد", strict=True)]
        dataset = some.encode([{"messages": messages}, row()])
        assert texts(some, dataset) == [
            "<|im_start|>user\nأ<|im_end|>\n<|im_start|>assistant\nب<|im_end|>",
            "<|im_start|>user\nأ<|im_end|>\n<|im_start|>assistant\nب~<|im_end|>\n"
            "<|im_start|>user\nج<|im_end|>\n<|im_start|>assistant\nد<|im_end|>",
            "<|im_start|>user\nسؤال<|im_end|>\n<|im_start|>assistant\nجواب<|im_end|>",
        ]


class TestBadRows:
    def test_all_are_named_at_once(self, loader, write):
        path = write([row(), {"text": "x"}, row("", "x"), row("س", "<|im_start|>"), row(), row("كلمة " * 200)])
        with pytest.raises(DatasetError) as error:
            loader(dataset_path=path, max_seq_length=64, validation_split=0).load()
        message = str(error.value)
        assert f"{path}:2: has the columns text, but needs" in message
        assert f"{path}:3: instruction: is empty" in message
        assert f"{path}:4: the assistant's text holds the control token <|im_start|>" in message
        assert re.search(
            rf"{path}:6: the prompt has \d+ tokens and leaves no room for an answer in max_seq_length=64", message
        )
        assert "\n4 bad rows; correct or remove them, or raise max_bad_rows (now 0)" in message

    def test_chunks_do_not_shift_places(self, loader, write, monkeypatch):
        monkeypatch.setattr(loaders, "_CHUNK", 2)
        path = write([row(), row(), row(), {"a": 1}, row(), row("كلمة " * 200)])
        with pytest.raises(DatasetError) as error:
            loader(dataset_path=path, max_seq_length=64).encode(path)
        assert [line.split(": ")[0] for line in str(error.value).splitlines()[:-1]] == [f"{path}:4", f"{path}:6"]

    def test_plain_dicts_are_named_by_number(self, loader):
        with pytest.raises(DatasetError, match=r"^row 1: instruction: is empty"):
            loader().encode([row(), row("")])

    def test_bad_validation_rows_are_named(self, loader, write):
        path = write([row(), {}], "validation.jsonl")
        with pytest.raises(DatasetError, match=r"validation\.jsonl:2: has the columns \(none\)"):
            loader(eval_dataset_path=path).load()


class TestBadRowsThatMayBeLeftOut:
    def test_they_are_left_out_counted_and_kept(self, loader, write, caplog, tmp_path):
        path = write([row(), row("", "x"), row("س", "ج"), {"a": 1}])
        some = loader(dataset_path=path, max_bad_rows=2, validation_split=0)
        with caplog.at_level(logging.INFO):
            splits = some.load()
        assert splits["train"].rows == 2
        assert "bad rows: 2 left out, listed in bad_rows.jsonl" in caplog.text
        (tmp_path / "run").mkdir()
        some.bad_rows.keep()
        entries = [json.loads(line) for line in (tmp_path / "run" / "bad_rows.jsonl").read_text().splitlines()]
        assert [entry["where"] for entry in entries] == [f"{path}:2", f"{path}:4"]
        assert entries[1]["row"] == {"a": 1}

    def test_one_more_than_allowed(self, loader, write, tmp_path):
        some = loader(dataset_path=write([row(), row("", "x"), {"a": 1}]), max_bad_rows=1, validation_split=0)
        with pytest.raises(DatasetError, match=r"2 bad rows; .* raise max_bad_rows \(now 1\)"):
            some.load()
        assert len((tmp_path / "run" / "bad_rows.jsonl").read_text().splitlines()) == 2

    def test_training_and_validation_rows_in_file_order(self, loader, write):
        lines = [row("س", ""), "broken", row(), row("س", "<|im_end|>")] * 5
        path = write(lines)
        with pytest.raises(DatasetError) as error:
            loader(dataset_path=path, validation_split=0.5).load()
        places = [int(line.split(":")[1]) for line in str(error.value).splitlines()[:10]]
        assert places == [1, 2, 4, 5, 6, 8, 9, 10, 12, 13]

    def test_the_split_does_not_depend_on_them(self, loader, write):
        """So that `compare`, which reads rows only, finds the rows that were held out."""
        path = write([row(), row("", "x"), "broken", *(row(f"س{i}", "ج") for i in range(20))])
        some = loader(dataset_path=path, max_bad_rows=5, validation_split=0.4)
        held_out = some.encode([r for r in some.split()["validation"] if r.values["instruction"]])
        assert texts(some, some.load()["validation"]) == texts(some, held_out)

    def test_nothing_left(self, loader, write):
        with pytest.raises(DatasetError, match=r"rows\.jsonl: no rows are left to train on"):
            loader(dataset_path=write([{}, {}]), max_bad_rows=2, validation_split=0).load()


class TestWeights:
    def test_fractions_and_copies_of_training_rows_only(self, loader, write):
        half = write([row(f"نصف{i}") for i in range(20)], "half.jsonl")
        twice = write([row(f"ضعف{i}") for i in range(20)], "twice.jsonl")
        sources = [{"path": str(half), "weight": 0.5}, {"path": str(twice), "weight": 2.25}]
        some = loader(dataset_path=sources, validation_split=0.5)
        splits = some.load()
        train, validation = texts(some, splits["train"]), texts(some, splits["validation"])
        plain = loader(dataset_path=[half, twice], validation_split=0.5).load()
        assert validation == texts(some, plain["validation"])
        halves = [text for text in texts(some, plain["train"]) if "نصف" in text]
        twos = [text for text in texts(some, plain["train"]) if "ضعف" in text]
        assert not set(train) & set(validation)
        assert sum("نصف" in text for text in train) == round(len(halves) / 2)
        assert {train.count(text) for text in twos} == {2, 3}
        assert sum("ضعف" in text for text in train) == 2 * len(twos) + round(len(twos) / 4)
        assert texts(some, loader(dataset_path=sources, validation_split=0.5).load()["train"]) == train
        assert texts(some, loader(dataset_path=sources, validation_split=0.5, data_seed=3).load()["train"]) != train

    def test_counts_are_of_what_is_trained_on(self, loader, write):
        path = write([row("سؤال", "كلمة " * 100)])
        some = loader(dataset_path=[{"path": path, "weight": 3}], validation_split=0, max_seq_length=64)
        dataset = some.load()["train"]
        assert (len(dataset), dataset.rows, dataset.truncated) == (3, 3, 3)


class TestMaxSamples:
    def test_a_seeded_choice_in_file_order(self, loader, sft_file):
        whole = texts(loader(), loader().encode(sft_file))
        some = texts(loader(), loader(max_samples=5, validation_split=0).load()["train"])
        assert len(some) == 5
        assert some == [text for text in whole if text in some] != whole[:5]
        assert some != texts(loader(), loader(max_samples=5, validation_split=0, data_seed=1).load()["train"])

    def test_of_training_and_validation_each(self, loader, sft_file):
        splits = loader(max_samples=3, eval_dataset_path=sft_file).load()
        assert {name: len(split) for name, split in splits.items()} == {"train": 3, "validation": 3}

    def test_more_than_there_are(self, loader):
        assert len(loader(max_samples=99, validation_split=0).load()["train"]) == 12


def test_the_first_example_is_shown_with_what_is_learned(loader, caplog):
    with caplog.at_level(logging.INFO):
        loader(validation_split=0).load()
    assert (
        "<|im_start|>user\nما عاصمة الأردن؟<|im_end|>\n<|im_start|>assistant\n⟦عاصمة الأردن هي عمّان.<|im_end|>⟧"
        in caplog.text
    )


class TestTruncation:
    def test_is_counted_and_cuts_the_end(self, loader, caplog):
        some = loader()
        whole = some.encode([row("سؤال", "كلمة أخرى. " * 20), row()])
        limit = whole.lengths[0] - 7
        cut = loader(max_seq_length=limit).encode([row("سؤال", "كلمة أخرى. " * 20), row()])
        assert (whole.truncated, whole.tokens_cut) == (0, 0)
        assert (cut.truncated, cut.tokens_cut) == (1, 7)
        assert cut.lengths == [limit, whole.lengths[1]]
        assert cut[0].prompt.tolist() == whole[0].prompt.tolist()
        for part, other in zip(cut[0].completions[0][:2], whole[0].completions[0][:2], strict=True):
            assert part.tolist() == other[:-7].tolist()

    def test_an_example_that_just_fits_is_whole(self, loader):
        length = loader().encode([row()]).lengths[0]
        assert loader(max_seq_length=length).encode([row()]).truncated == 0

    def test_prompt_that_fills_the_budget_is_a_bad_row(self, loader):
        prompt = len(loader().encode([row()])[0].prompt)
        assert loader(max_seq_length=prompt + 1).encode([row()]).truncated == 1
        for limit in (prompt, prompt - 1):
            with pytest.raises(DatasetError, match=f"the prompt has {prompt} tokens and leaves no room"):
                loader(max_seq_length=limit).encode([row()])

    def test_is_shown(self, loader, write, caplog):
        path = write([row(), row("سؤال", "كلمة " * 100)])
        with caplog.at_level(logging.INFO):
            dataset = loader(dataset_path=path, max_seq_length=64, validation_split=0).load()["train"]
        assert (
            f"train: 2 examples, {sum(dataset.lengths):,} tokens, {dataset.counts()['learned']} of them learned, longest 64, "
            f"1 answer cut, {dataset.tokens_cut} tokens lost" in caplog.text
        )
        assert "train: raise max_seq_length to keep whole answers" in caplog.text

    def test_nothing_cut_is_shown_too(self, loader, caplog):
        with caplog.at_level(logging.INFO):
            loader(validation_split=0).load()
        assert "12 examples" in caplog.text
        assert "none cut" in caplog.text
        assert "raise max_seq_length" not in caplog.text


def test_dataset_is_a_sequence_of_groups(loader, sft_file):
    dataset = loader().encode(sft_file)
    assert len(dataset) == len(list(dataset)) == 12
    assert dataset.lengths == [group.num_tokens for group in dataset]
    assert dataset[3] is dataset.groups[3]


def test_to_padded(loader):
    some = loader()
    messages = [{"role": r, "content": c} for r, c in zip(["user", "assistant"] * 2, "أبجد", strict=True)]
    dataset = some.encode([row(), {"messages": messages}])
    padded = to_padded(dataset, 99, "tokens")
    longest = max(dataset.lengths)
    assert padded.column_names == ["input_ids", "attention_mask", "labels", "tokens"]
    assert list(padded["tokens"]) == dataset.lengths
    for example, (prompt, ((ids, targets, _),), *_) in zip(padded, dataset, strict=True):
        tokens = [*prompt.tolist(), *ids.tolist()]
        padding = longest - len(tokens)
        assert example["input_ids"] == tokens + [99] * padding
        assert example["attention_mask"] == [1] * len(tokens) + [0] * padding
        assert len(example["labels"]) == longest
        learned = [i for i, label in enumerate(example["labels"]) if label != -100]
        assert learned == [len(prompt) + i for i, target in enumerate(targets) if target]
        assert [example["labels"][i] for i in learned] == [tokens[i] for i in learned]
    assert some.tokenizer.decode([label for label in padded[1]["labels"] if label != -100]) == "ب<|im_end|>د<|im_end|>"
