"""Loss and metrics of the validation rows by the dialect of their answers."""

import pytest

from arabic_qwen.data.dataset import GroupDataset
from arabic_qwen.text.dialects import UNKNOWN, Prediction
from tests.engine.test_trainer import sft_config
from tests.preference_runs import CONFIGS, preference_config, ready, write_rows

# Question and answer in turns Egyptian, Levantine and neither.
ANSWERS = {"EGY": "إزيك، كله تمام والنهارده حلو أوي", "LEV": "منيح، شو بدك هلأ", UNKNOWN: "صباح الخير"}
MARKS = {"أوي": "EGY", "شو": "LEV"}


class Classifier:
    """Knows a dialect by one word of it."""

    def predict(self, texts):
        found = [next((dialect for word, dialect in MARKS.items() if word in text), UNKNOWN) for text in texts]
        return [Prediction(dialect, 0.9) for dialect in found]


@pytest.fixture(autouse=True)
def classifier(monkeypatch):
    asked = []
    monkeypatch.setattr("arabic_qwen.data.dialects.load_classifier", lambda path: asked.append(path) or Classifier())
    return asked


def write(method, folder, counts):
    """Rows with so many answers in each dialect; the rejected answers are always Levantine."""
    rows = []
    for dialect, count in counts.items():
        for number in range(count):
            question, answer = f"{'كيف ' * number}الحال؟", f"{ANSWERS[dialect]} {'جدا ' * number}".strip()
            if method == "sft":
                rows.append({"instruction": question, "response": answer})
            elif method == "kto":
                rows.append({"prompt": question, "completion": answer, "label": number % 2 == 0})
            else:
                rows.append({"prompt": question, "chosen": answer, "rejected": f"شو {number}"})
                if method == "cpo" and number == 2:
                    rows[-1]["rejected"] = ["شو", "مين"]
    return write_rows(folder / "rows.jsonl", rows)


def trainer(method, model_dir, folder, counts, **values):
    data = write(method, folder, counts)
    values |= {"eval_dataset_path": str(data), "per_device_eval_batch_size": 3, "token_budget": 150}
    if method == "sft":
        return ready(sft_config(model_dir, data, folder / "run", **values))
    return ready(preference_config(method, model_dir, data, folder / "run", **values))


@pytest.mark.parametrize("method", ["sft", *sorted(CONFIGS), "dpo-aot", "kto-one-class"])
def test_equals_evaluating_the_dialect_alone(model_dir, tmp_path, method):
    method, _, variant = method.partition("-")
    values = {"loss_type": "aot"} if variant == "aot" else {}
    ours = trainer(method, model_dir, tmp_path, {"EGY": 6, "LEV": 5, UNKNOWN: 2}, **values)
    held_out = ours.dataset["validation"]
    assert held_out.dialects == ("EGY", "LEV")
    assert [group.tag for group in held_out] == [1] * 6 + [2] * 5 + [0] * 2
    if variant == "one-class":
        held_out.groups = [
            group._replace(completions=(group.completions[0]._replace(desirable=group.desirable or group.tag == 1),))
            for group in held_out
        ]
    metrics = ours.evaluate()
    names = ["eval_loss"] if method == "sft" else ["eval_loss", "eval_rewards/accuracies"]
    for tag, dialect in enumerate(held_out.dialects, 1):
        alone = ours.trainer.evaluate(GroupDataset([group for group in held_out if group.tag == tag]))
        for name in names:  # but for a float32's last bit
            assert metrics[f"{name}/{dialect}"] == pytest.approx(alone[name], rel=1.2e-7, abs=1e-6), name
    assert sum("/EGY" in name for name in metrics) == len(names)
    whole = ours.trainer.evaluate(GroupDataset([group._replace(tag=0) for group in held_out]))
    assert {name: metrics[name] for name in metrics if "/EGY" not in name and "/LEV" not in name} == {
        name: value for name, value in whole.items() if name in metrics
    }


@pytest.mark.parametrize("counts", [{"EGY": 9, "LEV": 4}, {"EGY": 9}, {UNKNOWN: 20}, {"EGY": 5, UNKNOWN: 5}], ids=str)
def test_too_few_rows_or_dialects(model_dir, tmp_path, counts):
    ours = trainer("sft", model_dir, tmp_path, counts)
    assert ours.dataset["validation"].dialects == ()
    assert set(ours.evaluate()) == {"eval_loss", "eval_perplexity"}


def test_rows_that_are_given_are_measured_by_dialect_too(model_dir, tmp_path, classifier):
    ours = trainer("sft", model_dir, tmp_path, {UNKNOWN: 3}, dialect_model="own.model")
    rows = [{"instruction": f"س {n}", "response": ANSWERS[d]} for d in ("EGY", "LEV") for n in range(5)]
    assert {"eval_loss/EGY", "eval_loss/LEV"} < set(ours.evaluate(rows))
    assert classifier == ["own.model"] * 2  # the training rows are not asked about


def test_logged_and_in_the_card(model_dir, tmp_path):
    ours = trainer("sft", model_dir, tmp_path, {"EGY": 5, "LEV": 5}, max_steps=2, eval_steps=1, save_steps=1)
    ours.train()
    assert "eval_loss/EGY" in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "| eval_loss/LEV |" in (tmp_path / "run" / "README.md").read_text()
