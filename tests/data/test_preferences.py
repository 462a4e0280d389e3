"""Rows of preference data: every layout, every wrong row, and what the loaders make of them."""

import json
import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arabic_qwen.config import CPOConfig, DPOConfig, IPOConfig, KTOConfig, ORPOConfig, SimPOConfig
from arabic_qwen.data.preferences import to_contrast, to_feedback, to_measured_pair, to_pair
from arabic_qwen.data.templates import set_template
from arabic_qwen.errors import DatasetError
from arabic_qwen.methods.registry import METHODS
from arabic_qwen.packing.batch import pack

CONFIGS = {config.method: config for config in (DPOConfig, IPOConfig, KTOConfig, CPOConfig, SimPOConfig, ORPOConfig)}


def system(text: str) -> dict:
    return {"role": "system", "content": text}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def pair(**values) -> dict:
    return {"prompt": "سؤال", "chosen": "صحيح", "rejected": "خطأ"} | values


def feedback(**values) -> dict:
    return {"prompt": "سؤال", "completion": "جواب", "label": True} | values


TALK = [user("أ"), assistant("ب"), user("ج")]


class TestPairs:
    @pytest.mark.parametrize(
        ("row", "prompt"),
        [
            (pair(), [user("سؤال")]),
            (pair(prompt=[user("سؤال")]), [user("سؤال")]),
            (pair(chosen=[assistant("صحيح")], rejected=[assistant("خطأ")]), [user("سؤال")]),
            (pair(chosen=[user("سؤال"), assistant("صحيح")], rejected=[user("سؤال"), assistant("خطأ")]), [user("سؤال")]),
            (pair(chosen=[assistant("صحيح")]), [user("سؤال")]),  # one of each kind
            (
                {"chosen": [user("سؤال"), assistant("صحيح")], "rejected": [user("سؤال"), assistant("خطأ")]},
                [user("سؤال")],
            ),
            ({"chosen": [*TALK, assistant("صحيح")], "rejected": [*TALK, assistant("خطأ")]}, TALK),
            (pair(prompt=None, chosen=[*TALK, assistant("صحيح")], rejected=[*TALK, assistant("خطأ")]), TALK),
            (pair(prompt=TALK), TALK),
            (pair(prompt=[system("كن موجزًا"), user("سؤال")]), [system("كن موجزًا"), user("سؤال")]),
            (pair(system="كن موجزًا"), [system("كن موجزًا"), user("سؤال")]),
            (
                {
                    "chosen": [{"from": "human", "value": "سؤال"}, {"from": "gpt", "value": "صحيح"}],
                    "rejected": [{"from": "human", "value": "سؤال"}, {"from": "gpt", "value": "خطأ"}],
                },
                [user("سؤال")],
            ),
            (pair(chosen_length=50, rejected_length=200, source="x", hard_negatives=[]), [user("سؤال")]),
        ],
        ids=[
            "text",
            "prompt as messages",
            "answers as messages",
            "answers with the prompt in them",
            "mixed",
            "implicit prompt",
            "implicit prompt of several turns",
            "prompt null",
            "prompt of several turns",
            "system message",
            "system column",
            "from/value",
            "further columns",
        ],
    )
    def test_layout(self, row, prompt):
        found = to_pair(row)
        assert found.prompt == prompt
        assert found.answers == ["صحيح", "خطأ"]
        assert found.desirable == (True, False)

    def test_system_prompt(self):
        assert to_pair(pair(), "كن مفيدًا").prompt == [system("كن مفيدًا"), user("سؤال")]
        assert to_pair(pair(system="كن موجزًا"), "كن مفيدًا").prompt[0] == system("كن موجزًا")
        own = [system("كن دقيقًا"), user("سؤال")]
        assert to_pair(pair(prompt=own, system="كن موجزًا"), "كن مفيدًا").prompt == own

    def test_row_is_left_as_it_is(self):
        row = pair(prompt=[user("سؤال")], system="كن موجزًا")
        before = json.dumps(row)
        to_pair(row)
        assert json.dumps(row) == before

    def test_a_text_prompt_may_stand_in_the_answers_too(self):
        whole = [system("كن موجزا"), user("سؤال"), assistant("جواب")]
        row = {"prompt": "سؤال", "chosen": whole, "rejected": [*whole[:2], assistant("خطأ")]}
        assert to_pair(row).prompt == whole[:2]

    @pytest.mark.parametrize(
        ("row", "problem"),
        [
            ({}, "has the columns (none), but needs prompt, chosen, rejected"),
            ({"instruction": "س", "response": "ج"}, "has the columns instruction, response, but needs prompt"),
            ({"prompt": "س", "chosen": "ج"}, "has the columns prompt, chosen, but needs prompt, chosen, rejected"),
            ({"prompt": "س", "rejected": "ج"}, "but needs prompt, chosen"),
            ({"chosen": "ج", "rejected": "خ"}, "prompt: is missing"),
            (pair(prompt=[]), "prompt: is missing"),
            (pair(prompt=""), "prompt: is empty"),
            (pair(prompt=" \n"), "prompt: is empty"),
            (pair(prompt=5), "prompt: must be text, found int"),
            (pair(chosen=""), "chosen: is empty"),
            (pair(chosen=None), "chosen: must be text, found nothing"),
            (pair(chosen={"role": "assistant"}), "chosen: must be text, found dict"),
            (pair(rejected="  "), "rejected: is empty"),
            (pair(rejected=None), "rejected: must be text, found nothing"),
            (pair(rejected=0.5), "rejected: must be text, found float"),
            (pair(rejected="\ud83d"), "rejected: has half of a surrogate pair"),
            (pair(rejected="صحيح"), "chosen and rejected are the same"),
            (pair(chosen=[assistant("ج")], rejected="ج"), "chosen and rejected are the same"),
            (pair(chosen=[]), "does not end with an answer of the assistant"),
            (pair(chosen=[assistant("")]), "chosen[0].content: is empty"),
            (pair(chosen=["ج", "د"]), "chosen[0]: must be an object with role and content, found a str"),
            (pair(chosen=[{"role": "tool", "content": "ج"}]), "chosen[0].role: 'tool' is no role"),
            (pair(chosen=[user("ج")]), "does not end with an answer of the assistant"),
            (pair(prompt=[user("س"), assistant("ج")]), "turn 3 is by assistant"),
            (pair(prompt=[system("س")]), "turn 1 is by assistant"),
            (pair(prompt=[assistant("س")]), "turn 1 is by assistant"),
            (pair(prompt=[user("س"), user("ع")]), "turn 2 is by user"),
            ({"chosen": [assistant("ج")], "rejected": [assistant("خ")]}, "turn 1 is by assistant"),
            (
                {"chosen": [user("س"), assistant("ج")], "rejected": [user("ع"), assistant("خ")]},
                "chosen and rejected answer different prompts",
            ),
            (
                {"chosen": [user("س"), assistant("ج")], "rejected": [*TALK, assistant("خ")]},
                "chosen and rejected answer different prompts",
            ),
            (pair(rejected=["خ", "غ"]), "rejected: only CPO learns from several rejected answers"),
            (pair(rejected=[]), "rejected: only CPO learns from several rejected answers"),
            (pair(hard_negatives=["خ"]), "hard_negatives: only CPO learns from several rejected answers"),
            (pair(system=5), "system: must be text, found int"),
        ],
    )
    def test_wrong_row(self, row, problem):
        with pytest.raises(ValueError) as error:
            to_pair(row)
        assert problem in str(error.value)


class TestContrasts:
    @pytest.mark.parametrize(
        ("values", "answers"),
        [
            ({"rejected": ["خ", "غ"], "hard_negatives": ["ض"]}, ["صحيح", "خ", "غ", "ض"]),
            ({"rejected": "خ"}, ["صحيح", "خ"]),
            ({"rejected": "خ", "hard_negatives": ["ض"]}, ["صحيح", "خ", "ض"]),
            ({"rejected": []}, ["صحيح"]),
            ({"rejected": [], "hard_negatives": ["ض"]}, ["صحيح", "ض"]),
            ({"rejected": ["خ"], "hard_negatives": None}, ["صحيح", "خ"]),
            ({"rejected": list("بتثجح")}, ["صحيح", *"بتثجح"]),
            ({"rejected": [assistant("خ")]}, ["صحيح", "خ"]),
            ({"rejected": [[assistant("خ")], [user("سؤال"), assistant("غ")]]}, ["صحيح", "خ", "غ"]),
            ({"rejected": [[assistant("خ")], "غ"], "hard_negatives": [[assistant("ض")]]}, ["صحيح", "خ", "غ", "ض"]),
            ({"rejected": ["خ", "خ"]}, ["صحيح", "خ", "خ"]),
            ({"rejected": None, "hard_negatives": ["ض"]}, ["صحيح", "ض"]),
            ({"rejected": "خ", "hard_negatives": "ض"}, ["صحيح", "خ", "ض"]),
        ],
    )
    def test_layout(self, values, answers):
        found = to_contrast(pair(**values))
        assert found.prompt == [user("سؤال")]
        assert found.answers == answers

    @pytest.mark.parametrize(
        ("values", "problem"),
        [
            ({"rejected": ["خ", ""]}, "negative 2: is empty"),
            ({"rejected": ["خ", None]}, "negative 2: must be text, found nothing"),
            ({"rejected": ["خ", "صحيح"]}, "chosen and negative 2 are the same"),
            ({"rejected": ["خ"], "hard_negatives": ["صحيح"]}, "chosen and negative 2 are the same"),
            ({"rejected": [], "hard_negatives": ["صحيح"]}, "chosen and rejected are the same"),
            ({"hard_negatives": 3}, "hard_negatives: must be a text or a list of texts, found a int"),
            ({"rejected": None}, "rejected: must be text, found nothing"),
            ({"rejected": [[user("ع"), assistant("خ")], "غ"]}, "turn 2 is by user"),
        ],
    )
    def test_wrong_row(self, values, problem):
        with pytest.raises(ValueError) as error:
            to_contrast(pair(**values))
        assert problem in str(error.value)

    def test_negatives_of_another_prompt(self):
        row = {
            "chosen": [user("س"), assistant("ج")],
            "rejected": [[user("س"), assistant("خ")], [*TALK, assistant("غ")]],
        }
        with pytest.raises(ValueError, match="chosen and negative 2 answer different prompts"):
            to_contrast(row)


class TestFeedback:
    @pytest.mark.parametrize(
        ("label", "meaning"),
        [(True, True), (False, False), (1, True), (0, False), ("desirable", True), ("undesirable", False)],
    )
    def test_labels(self, label, meaning):
        found = to_feedback(feedback(label=label))
        assert found.desirable == (meaning,)
        assert (found.prompt, found.answers) == ([user("سؤال")], ["جواب"])

    @pytest.mark.parametrize("label", [None, "", "good", "True", "true", 2, -1, 1.0, [True], {"a": 1}])
    def test_no_labels(self, label):
        with pytest.raises(ValueError) as error:
            to_feedback(feedback(label=label))
        assert str(error.value) == f"label: {label!r} is no label; use true or false"

    @pytest.mark.parametrize(
        ("row", "prompt"),
        [
            (feedback(completion=[assistant("جواب")]), [user("سؤال")]),
            (feedback(completion=[user("سؤال"), assistant("جواب")]), [user("سؤال")]),
            (feedback(prompt=None, completion=[*TALK, assistant("جواب")]), TALK),
            ({"completion": [user("سؤال"), assistant("جواب")], "label": True}, [user("سؤال")]),
            (feedback(prompt=[system("كن موجزًا"), *TALK]), [system("كن موجزًا"), *TALK]),
            (feedback(system="كن موجزًا"), [system("كن موجزًا"), user("سؤال")]),
        ],
    )
    def test_layout(self, row, prompt):
        found = to_feedback(row)
        assert (found.prompt, found.answers, found.desirable) == (prompt, ["جواب"], (True,))

    @pytest.mark.parametrize(
        ("row", "problem"),
        [
            (
                {"prompt": "س", "completion": "ج"},
                "has the columns prompt, completion, but needs prompt, completion, label",
            ),
            ({"prompt": "س", "label": True}, "but needs prompt, completion"),
            (pair(), "has the columns prompt, chosen, rejected, but needs prompt, completion, label"),
            ({"completion": "ج", "label": True}, "prompt: is missing"),
            (feedback(completion=""), "completion: is empty"),
            (feedback(completion=None), "completion: must be text, found nothing"),
            (feedback(completion=[]), "does not end with an answer of the assistant"),
            (feedback(prompt=[user("س"), assistant("ج")]), "turn 3 is by assistant"),
        ],
    )
    def test_wrong_row(self, row, problem):
        with pytest.raises(ValueError) as error:
            to_feedback(row)
        assert problem in str(error.value)


@pytest.fixture
def loader(tokenizer, tmp_path):
    """Method, configuration values -> its loader with the ChatML template."""
    set_template(tokenizer, "chatml", "")

    def build(method: str = "dpo", **values):
        values = {"output_dir": tmp_path / "run"} | values
        return METHODS[method].data_loader(CONFIGS[method](**values), tokenizer)

    return build


@pytest.fixture
def write(tmp_path):
    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
        return path

    return write


def prompts(some, dataset):
    return [some.tokenizer.decode(group.prompt) for group in dataset]


def answers(some, dataset):
    return [[some.tokenizer.decode(c.ids) for c in group.completions] for group in dataset]


PROMPT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


class TestLoaders:
    def test_of_each_method(self, loader):
        kinds = {
            "dpo": "DPODataLoader",
            "ipo": "IPODataLoader",
            "kto": "KTODataLoader",
            "cpo": "CPODataLoader",
            "simpo": "SimPODataLoader",
            "orpo": "ORPODataLoader",
        }
        assert {method: type(loader(method)).__name__ for method in kinds} == kinds

    @pytest.mark.parametrize("method", ["dpo", "ipo", "simpo", "orpo"])
    def test_pairs(self, method, loader):
        some = loader(method)
        dataset = some.encode([pair(chosen_length=5, rejected_length=7), pair(prompt="آخر")])
        assert prompts(some, dataset) == [PROMPT.format("سؤال"), PROMPT.format("آخر")]
        assert answers(some, dataset) == [["صحيح<|im_end|>", "خطأ<|im_end|>"]] * 2
        assert all(c.targets.all() for group in dataset for c in group.completions)
        assert (dataset.truncated, dataset.prompts_trimmed) == (0, 0)

    def test_lengths_of_ipo_are_kept_for_the_report(self, loader):
        dataset = loader("ipo").encode([pair(chosen_length=5, rejected_length=7.5), pair(prompt="آخر")])
        assert [group.lengths for group in dataset] == [(5, 7.5), None]
        batch = pack(dataset.groups)
        assert batch.lengths.tolist() == [5, 7.5, *batch.num_targets[2:].tolist()]
        assert loader("dpo").encode([pair(chosen_length=5, rejected_length=7)])[0].lengths is None

    @pytest.mark.parametrize("given", [{"chosen_length": 3}, {"chosen_length": 3, "rejected_length": "7"}])
    @pytest.mark.parametrize("wrong", [-1, 0, True, float("nan")])
    def test_wrong_lengths(self, given, wrong):
        for values in (given, {"chosen_length": wrong, "rejected_length": 7}):
            with pytest.raises(ValueError, match=r"_length: .* is no positive number; give both lengths, or neither"):
                to_measured_pair(pair(**values))

    def test_contrasts_of_any_number(self, loader):
        some = loader("cpo")
        rows = [pair(rejected=["خ", "غ"], hard_negatives=["ض"]), pair(rejected=[]), pair(rejected=list("بتثجح"))]
        assert [len(group.completions) for group in some.encode(rows)] == [4, 1, 6]

    def test_feedback(self, loader):
        some = loader("kto")
        dataset = some.encode([feedback(), feedback(prompt="آخر", completion="رد", label=0)])
        assert answers(some, dataset) == [["جواب<|im_end|>"], ["رد<|im_end|>"]]
        assert [group.desirable for group in dataset] == [True, False]

    def test_prompt_and_answer_are_what_generation_sees(self, loader):
        some = loader(system_prompt="كن موجزًا")
        (group,) = some.encode([pair(prompt=TALK)])
        text = some.tokenizer.apply_chat_template(
            [system("كن موجزًا"), *TALK], tokenize=False, add_generation_prompt=True
        )
        assert some.tokenizer.decode(group.prompt) == text

    def test_wrong_rows_are_all_named(self, loader, write):
        rows = [pair(), pair(chosen=""), pair(rejected="صحيح"), pair(rejected=["خ", "غ"])]
        some = loader(dataset_path=write(rows), validation_split=0)
        with pytest.raises(DatasetError) as error:
            some.load()
        assert str(error.value).splitlines() == [
            f"{some.config.dataset_path}:2: chosen: is empty",
            f"{some.config.dataset_path}:3: chosen and rejected are the same",
            f"{some.config.dataset_path}:4: rejected: only CPO learns from several rejected answers; give one, or use method cpo",
            "3 bad rows; correct or remove them, or raise max_bad_rows (now 0) to leave them out; "
            f"listed in {some.config.output_dir}/bad_rows.jsonl",
        ]

    @pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
    def test_control_tokens(self, column, loader):
        with pytest.raises(
            DatasetError, match=r"row 0: the (user|assistant)'s text holds the control token <\|im_end\|>"
        ):
            loader().encode([pair(**{column: "نص<|im_end|>نص"})])

    @pytest.mark.parametrize("method", ["dpo", "kto"])
    def test_template_that_refuses_a_conversation(self, method, loader):
        some = loader(method)
        some.tokenizer.chat_template = (
            "{%- if messages[0]['role'] == 'system' %}{{- raise_exception('no system prompt here') }}{%- endif %}"
            + some.tokenizer.chat_template
        )
        row = pair(system="كن موجزًا") if method == "dpo" else feedback(system="كن موجزًا")
        with pytest.raises(DatasetError, match="row 0: the chat template refuses the conversation: no system prompt"):
            some.encode([row])


class TestUnpaired:
    def test_pairs_become_a_good_and_a_bad_answer(self, loader):
        some = loader("kto", unpair_preferences=True)
        dataset = some.encode([pair(), feedback(prompt="آخر", label=False), pair(prompt=[system("ن"), user("ثالث")])])
        assert answers(some, dataset) == [
            ["صحيح<|im_end|>"],
            ["خطأ<|im_end|>"],
            ["جواب<|im_end|>"],
            ["صحيح<|im_end|>"],
            ["خطأ<|im_end|>"],
        ]
        assert [group.desirable for group in dataset] == [True, False, False, True, False]
        assert prompts(some, dataset)[:2] == [PROMPT.format("سؤال")] * 2

    @pytest.mark.parametrize(
        ("row", "problem"),
        [
            (
                {"prompt": "س", "chosen": "ج"},
                "row 0: has the columns prompt, chosen, but needs prompt, chosen, rejected",
            ),
            (pair(rejected="صحيح"), "row 0: chosen and rejected are the same"),
            (pair(rejected=["خ", "غ"]), "row 0: rejected: only CPO learns from several rejected answers"),
        ],
    )
    def test_wrong_pairs(self, row, problem, loader):
        with pytest.raises(DatasetError) as error:
            loader("kto", unpair_preferences=True).encode([row])
        assert problem in str(error.value)

    def test_only_when_asked_for(self, loader):
        with pytest.raises(DatasetError, match="is a pair; set unpair_preferences to true"):
            loader("kto").encode([pair()])

    def test_trimmed_prompts_count_once(self, loader):
        some = loader("kto", unpair_preferences=True, max_prompt_length=30)
        assert some.encode([pair(prompt="سؤال " * 60), feedback()]).prompts_trimmed == 1


class TestTrimming:
    """Prompts longer than max_prompt_length lose their beginning."""

    WORDS = " ".join(f"كلمة{n}" for n in range(60))

    def test_end_of_the_text_and_template_stay(self, loader):
        some = loader(max_prompt_length=40, max_seq_length=128)
        dataset = some.encode([pair(prompt=self.WORDS), pair()])
        trimmed, whole = prompts(some, dataset)
        assert trimmed.startswith("<|im_start|>user\n")
        assert trimmed.endswith("كلمة59<|im_end|>\n<|im_start|>assistant\n")
        assert whole == PROMPT.format("سؤال")
        assert 30 < len(dataset[0].prompt) <= 40
        assert dataset.prompts_trimmed == 1
        assert dataset.truncated == 0
        assert "1 prompt lost their beginning" in dataset.summary()
        content = trimmed.removeprefix("<|im_start|>user\n").removesuffix("<|im_end|>\n<|im_start|>assistant\n")
        assert self.WORDS.endswith(content)

    @given(
        words=st.text(alphabet="ابتثجحخدذرزسشصضطظعغفقكلمنهويءآأإؤئىةًٌٍَُِّْ ،؟😀", min_size=60, max_size=90),
        limit=st.integers(24, 40),
    )
    def test_letters_are_not_broken(self, words, limit, tokenizer_file):
        from transformers import PreTrainedTokenizerFast

        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=str(tokenizer_file),
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
            extra_special_tokens=["<|im_start|>"],
        )
        set_template(tokenizer, "chatml", "")
        some = METHODS["dpo"].data_loader(DPOConfig(max_prompt_length=limit), tokenizer)
        text = "س" + words + "ع"
        dataset = some.encode([pair(prompt=text)])
        (found,) = prompts(some, dataset)
        content = found.removeprefix("<|im_start|>user\n").removesuffix("<|im_end|>\n<|im_start|>assistant\n")
        assert "\ufffd" not in content
        normal = tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids)
        assert normal.endswith(content)
        assert len(dataset[0].prompt) <= limit
        assert dataset.prompts_trimmed == (len(content) < len(normal))

    def test_oldest_turns_go_first(self, loader):
        talk = [user(self.WORDS), assistant("ب"), user("أخير")]
        some = loader(max_prompt_length=40)
        dataset = some.encode([pair(prompt=talk)])
        (found,) = prompts(some, dataset)
        assert len(dataset[0].prompt) <= 40
        assert found.endswith("أخير<|im_end|>\n<|im_start|>assistant\n")
        assert self.WORDS not in found
        assert dataset.prompts_trimmed == 1
        whole = loader(max_prompt_length=300).encode([pair(prompt=talk)])
        some = loader(max_prompt_length=len(whole[0].prompt) - 1)
        (found,) = prompts(some, some.encode([pair(prompt=talk)]))
        assert "ب<|im_end|>" in found and self.WORDS not in found  # one token over costs no whole turn

    def test_system_prompt_stays(self, loader):
        some = loader(max_prompt_length=60, system_prompt="كن موجزًا")
        (found,) = prompts(some, some.encode([pair(prompt=[user("أ"), assistant("ب"), user(self.WORDS)])]))
        assert found.startswith("<|im_start|>system\nكن موجزًا<|im_end|>\n<|im_start|>user\n")
        assert found.endswith("كلمة59<|im_end|>\n<|im_start|>assistant\n")

    def test_prompt_of_exactly_the_length_is_whole(self, loader):
        length = len(loader().encode([pair()])[0].prompt)
        assert loader(max_prompt_length=length).encode([pair()]).prompts_trimmed == 0
        assert loader(max_prompt_length=length - 1).encode([pair()]).prompts_trimmed == 1

    @pytest.mark.parametrize("text", ["سؤال", "س" * 200])
    def test_no_room_for_any_text(self, text, loader):
        with pytest.raises(DatasetError, match="row 0: prompt: its template alone fills max_prompt_length=5"):
            loader(max_prompt_length=5).encode([pair(prompt=text)])

    def test_every_completion_has_the_same_prompt(self, loader):
        some = loader("cpo", max_prompt_length=40)
        (group,) = some.encode([pair(prompt=self.WORDS, rejected=["خ", "غ"])])
        assert len(group.prompt) <= 40
        assert len(group.completions) == 3


class TestLength:
    LONG = " ".join(f"جواب{n}" for n in range(40))

    def test_long_answers_are_cut_and_counted(self, loader, caplog, write):
        some = loader(max_length=64, dataset_path=write([pair(chosen=self.LONG), pair()]), validation_split=0)
        with caplog.at_level(logging.INFO):
            dataset = some.load()["train"]
        (chosen, rejected) = dataset[0].completions
        assert len(dataset[0].prompt) + len(chosen.ids) == 64
        assert rejected.ids[-1] == some.tokenizer.eos_token_id != chosen.ids[-1]
        whole = loader(max_length=4096).encode([pair(chosen=self.LONG)])[0].completions[0]
        assert dataset.truncated == 1
        assert dataset.tokens_cut == len(whole.ids) - len(chosen.ids)
        assert np.array_equal(whole.ids[: len(chosen.ids)], chosen.ids)
        assert f"1 answer cut, {dataset.tokens_cut:,} tokens lost" in caplog.text

    def test_defaults_to_max_seq_length(self, loader):
        def longest(**values):
            return len(loader(**values).encode([pair(chosen=self.LONG)])[0].completions[0].ids)

        assert longest(max_seq_length=64) == longest(max_length=64) < longest()
        assert longest(max_seq_length=32, max_length=64) == longest(max_length=64)

    def test_identical_after_the_cut(self, loader):
        row = pair(chosen=self.LONG + " نعم", rejected=self.LONG + " لا")
        assert len(loader(max_length=4096).encode([row])) == 1
        with pytest.raises(
            DatasetError, match="row 0: chosen and rejected are the same once they are cut at max_length=64"
        ):
            loader(max_length=64).encode([row])
        with pytest.raises(DatasetError, match="cut at max_seq_length=64"):
            loader(max_seq_length=64).encode([row])
        negatives = pair(chosen=self.LONG + " نعم", rejected=["لا", self.LONG + " لا"])
        with pytest.raises(DatasetError, match="the same once they are cut"):
            loader("cpo", max_length=64).encode([negatives])

    def test_no_room_for_an_answer(self, loader):
        with pytest.raises(
            DatasetError, match=r"row 0: the prompt has \d+ tokens and leaves no room .* in max_length=16"
        ):
            loader(max_length=16, max_prompt_length=256).encode([pair(prompt="سؤال طويل جدًا عن أشياء كثيرة")])


class TestMismatched:
    """KTO's completions of other prompts."""

    def rows(self, count, per_prompt):
        return [
            feedback(prompt=f"سؤال {n // per_prompt}", completion=f"جواب {n}", label=n % 2 == 0) for n in range(count)
        ]

    @pytest.mark.parametrize(("count", "per_prompt"), [(2, 1), (9, 1), (12, 2), (12, 6), (13, 12), (40, 5)])
    @pytest.mark.parametrize("seed", [0, 1])
    def test_never_share_the_prompt(self, count, per_prompt, seed, loader):
        some = loader("kto", data_seed=seed)
        dataset = some.encode(self.rows(count, per_prompt))
        own = {bytes(g.completions[0].ids): bytes(g.prompt) for g in dataset}
        assert len(dataset) == count
        for group in dataset:
            assert own[bytes(group.auxiliary[0].ids)] != bytes(group.prompt)

    def test_distinct_prompts_use_every_completion_once(self, loader):
        dataset = loader("kto").encode(self.rows(20, 1))
        used = [bytes(group.auxiliary[0].ids) for group in dataset]
        assert sorted(used) == sorted(bytes(group.completions[0].ids) for group in dataset)

    def test_are_seeded(self, loader):
        def found(seed):
            return [bytes(g.auxiliary[0].ids) for g in loader("kto", data_seed=seed).encode(self.rows(20, 1))]

        assert found(1) == found(1) != found(2)

    def test_of_a_pair(self, loader):
        some = loader("kto", unpair_preferences=True)
        for group in some.encode([pair(prompt=f"سؤال {n}", chosen=f"نعم {n}", rejected=f"لا {n}") for n in range(6)]):
            number = some.tokenizer.decode(group.prompt).split("<|im_end|>")[0][-1]
            assert some.tokenizer.decode(group.auxiliary[0].ids).removesuffix("<|im_end|>")[-1] != number

    def test_fit_behind_their_new_prompt(self, loader):
        rows = [feedback(prompt="سؤال " * 20), feedback(prompt="س", completion="جواب " * 60)]
        for group in loader("kto", max_length=128).encode(rows):
            assert len(group.prompt) + len(group.auxiliary[0].ids) <= 128
            assert len(group.auxiliary[0].ids) == len(group.auxiliary[0].targets) > 0

    def test_unpaired_rows_are_split_by_prompt(self, loader, write):
        rows = [pair(prompt=f"سؤال {n // 2}", rejected=f"خطأ {n}") for n in range(40)]
        values = dict(dataset_path=write(rows), validation_split=0.25)
        kto = loader("kto", unpair_preferences=True, **values)
        assert kto.split() == loader("dpo", **values).split()
        assert kto.prompt(rows[0])[-1] == user("سؤال 0")

    def test_one_prompt_is_not_enough_to_train_on(self, loader, write):
        with pytest.raises(DatasetError, match="all rows to train on have the same prompt; add rows"):
            loader("kto", dataset_path=write(self.rows(4, 4)), validation_split=0).load()
        assert all(not group.auxiliary for group in loader("kto").encode(self.rows(4, 4)))
