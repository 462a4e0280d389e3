import json

import pytest

from arabic_qwen.config import (
    METHOD_CONFIGS,
    BaseConfig,
    CPOConfig,
    DPOConfig,
    IPOConfig,
    KTOConfig,
    ORPOConfig,
    PreferenceConfig,
    ReferenceConfig,
    SimPOConfig,
    load_config,
)
from arabic_qwen.errors import ConfigurationError

CLASSES = [DPOConfig, KTOConfig, IPOConfig, CPOConfig, SimPOConfig, ORPOConfig]
WITH_REFERENCE = [DPOConfig, KTOConfig, IPOConfig]

# "Method-Specific Parameters" of the training documentation, the learning rates of its examples, and this project's own for SimPO and ORPO.
DOCUMENTED = {
    DPOConfig: {
        "beta": 0.1,
        "loss_type": "sigmoid",
        "label_smoothing": 0.0,
        "max_prompt_length": 256,
        "ref_model_name": None,
        "learning_rate": 5e-7,
    },
    KTOConfig: {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0, "learning_rate": 1e-6},
    IPOConfig: {"beta": 0.1, "tau": 0.1, "label_smoothing": 0.0, "learning_rate": 5e-7},
    CPOConfig: {
        "beta": 0.1,
        "cpo_alpha": 1.0,
        "simpo_gamma": 1.0,
        "loss_type": "sigmoid",
        "learning_rate": 5e-7,
    },
    SimPOConfig: {"beta": 2.0, "gamma_beta_ratio": 0.5, "loss_type": "simpo", "learning_rate": 1e-6},
}

EXAMPLES = {
    DPOConfig: dict(
        model_name="Qwen/Qwen2.5-7B",
        dataset_path="data/dpo_preferences.jsonl",
        output_dir="./checkpoints/dpo",
        beta=0.1,
        loss_type="sigmoid",
        max_prompt_length=256,
        max_length=512,
        learning_rate=5e-7,
        num_train_epochs=1,
    ),
    KTOConfig: dict(
        model_name="Qwen/Qwen2.5-7B",
        dataset_path="data/kto_feedback.jsonl",
        beta=0.1,
        desirable_weight=1.0,
        undesirable_weight=1.0,
        learning_rate=1e-6,
    ),
    IPOConfig: dict(
        model_name="Qwen/Qwen2.5-7B",
        dataset_path="data/ipo_preferences.jsonl",
        beta=0.1,
        tau=0.1,
        label_smoothing=0.0,
        learning_rate=5e-7,
    ),
    CPOConfig: dict(
        model_name="Qwen/Qwen2.5-7B",
        dataset_path="data/cpo_preferences.jsonl",
        beta=0.1,
        cpo_alpha=1.0,
        simpo_gamma=1.0,
        loss_type="sigmoid",
        learning_rate=5e-7,
    ),
}


@pytest.mark.parametrize(
    ("cls", "name", "value"),
    [(cls, name, value) for cls, values in DOCUMENTED.items() for name, value in values.items()],
)
def test_documented_default(cls, name, value):
    default = getattr(cls(), name)
    assert default == value
    assert type(default) is type(value)


@pytest.mark.parametrize("cls", EXAMPLES)
def test_documented_example(cls):
    config = cls(**EXAMPLES[cls])
    for name, value in EXAMPLES[cls].items():
        assert getattr(config, name) == value


@pytest.mark.parametrize("cls", CLASSES)
def test_shares_the_common_parameters(cls):
    assert issubclass(cls, PreferenceConfig)
    assert issubclass(cls, ReferenceConfig) == (cls in WITH_REFERENCE)
    own = {"learning_rate"}
    for name, field in BaseConfig.model_fields.items():
        if name not in own:
            assert cls.model_fields[name].get_default(call_default_factory=True) == field.get_default(
                call_default_factory=True
            ), name
    assert METHOD_CONFIGS[cls.method] is cls


@pytest.mark.parametrize("cls", CLASSES)
def test_every_parameter_is_described(cls):
    assert all(field.description for field in cls.model_fields.values())
    assert json.dumps(cls.model_json_schema())
    assert "# Preference optimisation" in cls.commented_yaml()


@pytest.mark.parametrize("cls", CLASSES)
def test_yaml_round_trip(cls, tmp_path):
    config = cls(beta=0.25, max_length=128, output_dir="out")
    config.to_yaml(tmp_path / "run.yaml")
    assert load_config(tmp_path / "run.yaml") == config
    assert type(load_config(tmp_path / "run.yaml")) is cls


def test_scientific_notation_in_yaml(tmp_path):
    (tmp_path / "run.yaml").write_text("method: dpo\nlearning_rate: 5e-7\nbeta: 1e-1\n")
    config = load_config(tmp_path / "run.yaml", ["label_smoothing=1e-3"])
    assert (config.learning_rate, config.beta, config.label_smoothing) == (5e-7, 0.1, 0.001)


@pytest.mark.parametrize("cls", CLASSES)
def test_max_length_is_left_to_max_seq_length(cls):
    assert cls().max_length is None
    assert cls(max_length=64).max_length == 64


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (DPOConfig, {"beta": 0}, "beta: input should be greater than 0"),
        (DPOConfig, {"beta": -0.1}, "beta"),
        (DPOConfig, {"label_smoothing": 0.5}, "label_smoothing: input should be less than 0.5"),
        (DPOConfig, {"label_smoothing": -0.1}, "label_smoothing"),
        (DPOConfig, {"max_prompt_length": 0}, "max_prompt_length"),
        (DPOConfig, {"max_length": 4}, "max_length"),
        (DPOConfig, {"tau": 0.1}, "tau: unknown key of DPOConfig"),
        (DPOConfig, {"bata": 0.1}, "did you mean 'beta'"),
        (IPOConfig, {"tau": 0}, "tau: input should be greater than 0"),
        (IPOConfig, {"loss_type": "ipo"}, "loss_type: unknown key of IPOConfig"),
        (KTOConfig, {"desirable_weight": -1}, "desirable_weight"),
        (KTOConfig, {"undesirable_weight": -1}, "undesirable_weight"),
        (CPOConfig, {"cpo_alpha": -1}, "cpo_alpha"),
        (CPOConfig, {"ref_model_name": "x"}, "ref_model_name: unknown key of CPOConfig"),
        (SimPOConfig, {"gamma_beta_ratio": -0.1}, "gamma_beta_ratio"),
        (SimPOConfig, {"loss_type": "sigmoid"}, "'simpo'"),
        (ORPOConfig, {"beta": -0.1}, "beta"),
    ],
)
def test_bad_values(cls, values, message):
    with pytest.raises(ConfigurationError) as error:
        cls(**values)
    assert message in str(error.value)


class TestLossTypes:
    """The configuration does not import torch, so it repeats names that the losses define."""

    @staticmethod
    def choices(cls):
        return set(cls.model_fields["loss_type"].annotation.__args__)

    def test_of_dpo(self):
        from arabic_qwen.methods.dpo.loss import DPO_LOSSES

        assert self.choices(DPOConfig) == set(DPO_LOSSES)

    def test_of_cpo(self):
        from arabic_qwen.methods.cpo.loss import CPO_LOSSES

        assert self.choices(CPOConfig) == set(CPO_LOSSES)

    def test_with_label_smoothing(self):
        from arabic_qwen.methods.dpo import LABEL_SMOOTHED
        from arabic_qwen.methods.dpo.loss import DPO_LOSSES

        accepted = set()
        for loss_type in DPO_LOSSES:
            try:
                accepted.add(DPOConfig(loss_type=loss_type, label_smoothing=0.1).loss_type)
            except ConfigurationError as error:
                assert f"loss_type {loss_type!r} has no label smoothing; set label_smoothing to 0" in str(error)
        assert accepted == set(LABEL_SMOOTHED)

    def test_without_label_smoothing(self):
        from arabic_qwen.methods.dpo.loss import DPO_LOSSES

        for loss_type in set(DPO_LOSSES) - {"exo_pair"}:
            assert DPOConfig(loss_type=loss_type).label_smoothing == 0
        with pytest.raises(
            ConfigurationError, match="'exo_pair' takes the logarithm of label_smoothing; set it above 0"
        ):
            DPOConfig(loss_type="exo_pair")

    def test_at_assignment(self):
        config = DPOConfig(label_smoothing=0.1)
        with pytest.raises(ConfigurationError, match="no label smoothing"):
            config.loss_type = "nca_pair"
        assert config.loss_type == "sigmoid"
        config.loss_type = "exo_pair"
        with pytest.raises(ConfigurationError, match="above 0"):
            config.label_smoothing = 0.0
        assert config.label_smoothing == 0.1

    def test_unknown_names_those_that_exist(self):
        with pytest.raises(ConfigurationError, match=r"'sigmoid'.*'sft', got 'kto_pair'"):
            DPOConfig(loss_type="kto_pair")


@pytest.mark.parametrize("cls", CLASSES)
def test_common_checks_hold_too(cls):
    with pytest.raises(ConfigurationError, match="load_in_4bit and load_in_8bit are both true"):
        cls(load_in_4bit=True, load_in_8bit=True)


def test_softmax_over_negatives_needs_the_sigmoid_loss():
    assert CPOConfig(negatives="softmax").negatives == "softmax"
    with pytest.raises(ConfigurationError, match=r"negatives 'softmax' needs loss_type 'sigmoid', not 'hinge'"):
        CPOConfig(negatives="softmax", loss_type="hinge")
