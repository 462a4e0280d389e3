import contextlib
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import TrainerCallback

from arabic_qwen.config import BaseConfig, SFTConfig, load_config
from arabic_qwen.config.base import PROMPT_FORMAT
from arabic_qwen.config.yaml_io import dump_yaml, read_config_file
from arabic_qwen.errors import ConfigurationError


@pytest.fixture
def read(tmp_path):
    """Text of a YAML file and overrides -> its values."""

    def read(text: str | bytes, *overrides: str) -> dict:
        path = tmp_path / "run.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_config_file(path, list(overrides)).values

    return read


@pytest.fixture
def load(tmp_path):
    """Text of a YAML file and overrides -> an SFTConfig."""

    def load(text: str, *overrides: str) -> SFTConfig:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return SFTConfig.from_yaml(path, list(overrides))

    return load


def test_exponents_without_a_point(load):
    assert load("learning_rate: 1e-5").learning_rate == 1e-5
    assert load("learning_rate: 5E-7").learning_rate == 5e-7
    assert load("", "learning_rate=1e-5").learning_rate == 1e-5


@pytest.mark.parametrize("written", ["no", "No", "off", "false", "'no'"])
def test_strategy_no_is_not_a_boolean(load, written):
    assert load(f"evaluation_strategy: {written}\nsave_strategy: {written}").evaluation_strategy == "no"
    assert load("", f"evaluation_strategy={written}").evaluation_strategy == "no"


def test_strategy_yes_is_refused(load):
    with pytest.raises(ConfigurationError, match=r"evaluation_strategy: .* 'no', 'steps' or 'epoch', got True"):
        load("evaluation_strategy: yes")


def test_arabic_and_comments(load):
    config = load("# تعليق\nsystem_prompt: أجب بالعربية الفصحى.  # تعليق آخر\n")
    assert config.system_prompt == "أجب بالعربية الفصحى."


def test_byte_order_mark_and_windows_line_ends(read):
    assert read(b"\xef\xbb\xbfseed: 1\r\nlora_r: 4\r\n") == {"seed": 1, "lora_r": 4}


@pytest.mark.parametrize("text", ["", "\n", "# only a comment\n", "---\n"])
def test_empty_file_has_no_values(read, text):
    assert read(text) == {}


class TestVariables:
    def test_is_replaced(self, load, monkeypatch):
        monkeypatch.setenv("AQ_MODEL", "models/قوين")
        assert load("model_name: ${AQ_MODEL}").model_name == "models/قوين"
        assert load("model_name: ${AQ_MODEL}/v2").model_name == "models/قوين/v2"

    def test_default(self, load, monkeypatch):
        monkeypatch.delenv("AQ_MODEL", raising=False)
        assert load("model_name: ${AQ_MODEL:-small}").model_name == "small"
        monkeypatch.setenv("AQ_MODEL", "")
        assert load("model_name: ${AQ_MODEL:-small}").model_name == "small"
        monkeypatch.setenv("AQ_MODEL", "large")
        assert load("model_name: ${AQ_MODEL:-small}").model_name == "large"

    def test_missing_is_named_with_its_key(self, load, monkeypatch):
        monkeypatch.delenv("AQ_MODEL", raising=False)
        with pytest.raises(
            ConfigurationError, match=r"run\.yaml:1: model_name: environment variable AQ_MODEL is not set"
        ):
            load("model_name: ${AQ_MODEL}")

    @pytest.mark.parametrize(
        ("line", "name", "value"),
        [
            ("learning_rate: ${AQ:-1e-5}", "learning_rate", 1e-5),
            ("seed: ${AQ:-7}", "seed", 7),
            ("use_lora: ${AQ:-false}", "use_lora", False),
            ("evaluation_strategy: ${AQ:-no}", "evaluation_strategy", "no"),
            ("max_steps: ${AQ:-null}", "max_steps", None),
            ("eval_dataset_path: ${AQ:-}", "eval_dataset_path", None),
            ("lora_target_modules: ${AQ:-[q_proj, o_proj]}", "lora_target_modules", ["q_proj", "o_proj"]),
            ("lora_target_modules: ['${AQ:-k_proj}', v_proj]", "lora_target_modules", ["k_proj", "v_proj"]),
        ],
    )
    def test_value_of_any_type(self, load, line, name, value):
        assert getattr(load(line), name) == value

    @pytest.mark.parametrize("job", ["12345", "0123", "2024-01-01", "1e5", "yes", "a: b", "#7", "*x"])
    def test_text_stays_text(self, load, monkeypatch, job):
        monkeypatch.setenv("AQ_JOB", job)
        assert load("run_name: ${AQ_JOB}").run_name == job
        assert load('run_name: "${AQ_JOB}"').run_name == job
        assert load("", "run_name=${AQ_JOB}").run_name == job

    def test_text_around_it_is_not_read_as_yaml_again(self, load, monkeypatch):
        monkeypatch.setenv("AQ_WORD", "Answer")
        assert load('response_template: "### ${AQ_WORD}:\\n"').response_template == "### Answer:\n"
        assert load('system_prompt: "a: ${AQ_WORD}\\n\\nb: c"').system_prompt == "a: Answer\n\nb: c"

    def test_doubled_dollar_stands_for_itself(self, load):
        assert load("system_prompt: price $${PRICE}").system_prompt == "price ${PRICE}"

    def test_dollar_without_a_name_stands_for_itself(self, load):
        assert load("system_prompt: cost $5 and ${ x").system_prompt == "cost $5 and ${ x"

    def test_values_of_variables_are_not_searched_for_variables(self, load, monkeypatch):
        monkeypatch.setenv("AQ_A", "${AQ_B}")
        assert load("run_name: ${AQ_A}").run_name == "${AQ_B}"


class TestOverrides:
    def test_add_and_replace(self, load):
        config = load("lora_r: 4\nseed: 1", "lora_r=8", "packing=false", "lora_target_modules=[k_proj, o_proj]")
        assert (config.lora_r, config.seed, config.packing) == (8, 1, False)
        assert config.lora_target_modules == ["k_proj", "o_proj"]

    def test_null_and_equals_signs_in_values(self, load):
        config = load("max_steps: 5", "max_steps=null", "system_prompt=a=b")
        assert config.max_steps is None
        assert config.system_prompt == "a=b"

    def test_the_last_one_wins(self, load):
        assert load("", "seed=1", "seed=2").seed == 2

    @pytest.mark.parametrize("override", ["lora_r", "=8", ""])
    def test_without_key_and_value(self, load, override):
        with pytest.raises(ConfigurationError, match=f"^{override}: overrides are written key=value"):
            load("", override)

    def test_malformed_value(self, load):
        with pytest.raises(ConfigurationError, match=r"lora_target_modules=\[a"):
            load("", "lora_target_modules=[a")

    def test_unknown_key(self, load):
        with pytest.raises(ConfigurationError, match="did you mean 'lora_r'"):
            load("", "lora_rr=8")


class TestErrors:
    @pytest.mark.parametrize(
        ("text", "line"),
        [
            ("seed: 1\nlora_r: 2: 3\n", 2),
            ("seed: 1\n\n\trun_name: x\n", 3),
            ("seed: 1\nlora_target_modules: [a, b\n", 3),
            ('seed: 1\nrun_name: "open\n', 3),
            ("seed: 1\nlora_r: 2\nseed: 2\n", 3),
            ("seed: !!python/object:os.system {}\n", 1),
            ("seed: 1\n---\nseed: 2\n", 2),
        ],
    )
    def test_malformed_yaml_names_file_and_line(self, read, text, line):
        with pytest.raises(ConfigurationError, match=rf"run\.yaml:{line}: not valid YAML"):
            read(text)

    @pytest.mark.parametrize("text", ["run_name: 2024-13-01", "run_name: 0x_", "run_name: a\0b"])
    def test_what_pyyaml_itself_stumbles_over(self, read, text):
        with pytest.raises(ConfigurationError, match=r"run\.yaml.*: not valid YAML") as error:
            read(text)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize(("text", "kind"), [("- a\n- b\n", "list"), ("7", "int"), ("hello", "str")])
    def test_no_mapping(self, read, text, kind):
        with pytest.raises(ConfigurationError, match=f"must hold `key: value` lines, found a {kind}"):
            read(text)

    def test_missing_file(self, tmp_path):
        with pytest.raises(ConfigurationError, match=r"none\.yaml: cannot be read \(No such file"):
            read_config_file(tmp_path / "none.yaml", [])

    def test_directory(self, tmp_path):
        with pytest.raises(ConfigurationError, match="cannot be read"):
            read_config_file(tmp_path, [])

    def test_other_encoding(self, read):
        with pytest.raises(ConfigurationError, match=r"is not UTF-8 text \(byte 10\)"):
            read("run_name: مرحبا".encode("cp1256"))

    def test_another_method(self, load):
        with pytest.raises(
            ConfigurationError, match=r"run\.yaml:1: method: 'dpo' is not 'sft', which SFTConfig is for"
        ):
            load("method: dpo")

    def test_bad_values_are_all_named_with_the_file(self, load):
        with pytest.raises(ConfigurationError) as error:
            load("lora_r: 0\nlearningrate: 1\n")
        first, second = str(error.value).splitlines()
        assert "run.yaml:1: lora_r: " in first
        assert "run.yaml:2: learningrate: unknown key" in second


class TestRoundTrip:
    texts = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("${}:-#'\"\\\n\r \x85\u2028شكرًا"))

    @given(
        prompt=texts | st.none(),
        template=texts,
        rate=st.floats(min_value=1e-300, max_value=1e300),
        epochs=st.integers(1, 9) | st.floats(0.01, 9),
        targets=st.lists(texts, min_size=1) | st.just("all-linear"),
        strategy=st.sampled_from(["no", "steps", "epoch"]),
        report=st.lists(st.sampled_from(["wandb", "no", "on", "1", "null"])) | st.just("none"),
    )
    @example("${HOME}", "$${HOME}", 1e-5, 1, ["${HOME:-x}"], "no", "none")
    @example("a\x85b", "\u2028", 1e-5, 1, ["a\x85b"], "no", "none")
    @example("yes", "null", 1e16, 1, ["~", "1e-5", "0123"], "no", "none")
    @example("سطر أول\nسطر ثان\r\n\tثالث", " ### ${X\n", 1e-5, 3.0, ["q_proj"], "no", [])
    @example("a" * 12_000 + " " + "ب" * 100, "", 1e-5, 3, ["# a", "- b", "[c]"], "no", [])
    def test_any_values(self, tmp_path_factory, prompt, template, rate, epochs, targets, strategy, report):
        config = SFTConfig(
            system_prompt=prompt,
            response_template=template,
            learning_rate=rate,
            num_train_epochs=epochs,
            lora_target_modules=targets,
            evaluation_strategy=strategy,
            report_to=report,
        )
        path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
        config.to_yaml(path)
        assert SFTConfig.from_yaml(path) == config

    def test_every_default(self, tmp_path):
        SFTConfig().to_yaml(tmp_path / "a.yaml")
        assert SFTConfig.from_yaml(tmp_path / "a.yaml") == SFTConfig()

    def test_unset_output_dir_stays_unset(self, tmp_path):
        SFTConfig().to_yaml(tmp_path / "a.yaml")
        assert SFTConfig.from_yaml(tmp_path / "a.yaml").resolved_output_dir == "./checkpoints/sft"
        SFTConfig(output_dir="./checkpoints").to_yaml(tmp_path / "b.yaml")
        assert SFTConfig.from_yaml(tmp_path / "b.yaml").resolved_output_dir == "./checkpoints"

    def test_callbacks_stay_out(self, tmp_path):
        SFTConfig(callbacks=[TrainerCallback()]).to_yaml(tmp_path / "a.yaml")
        assert "callbacks" not in (tmp_path / "a.yaml").read_text(encoding="utf-8")
        assert SFTConfig.from_yaml(tmp_path / "a.yaml").callbacks == []

    def test_arabic_is_written_readably_and_one_line_a_key(self, tmp_path):
        SFTConfig(system_prompt="أجب بالعربية.\nوباختصار.").to_yaml(tmp_path / "a.yaml")
        lines = (tmp_path / "a.yaml").read_text(encoding="utf-8").splitlines()
        assert 'system_prompt: "أجب بالعربية.\\nوباختصار."' in lines
        assert lines[0] == "method: sft"
        assert len(lines) == 1 + len(SFTConfig.model_fields) - 2  # without callbacks and the unset output_dir


class TestCommentedYaml:
    def test_parses_back_to_the_defaults(self, tmp_path):
        path = tmp_path / "init.yaml"
        path.write_text(SFTConfig.commented_yaml(), encoding="utf-8")
        config = SFTConfig.from_yaml(path)
        assert config.output_dir == "./checkpoints/sft"
        assert config.model_copy(update={"output_dir": "./checkpoints"}) == SFTConfig()

    def test_every_field_has_its_description_and_every_section_its_heading(self):
        lines = SFTConfig.commented_yaml().splitlines()
        for name, field in SFTConfig.model_fields.items():
            written = [line for line in lines if line.removeprefix("# ").startswith(f"{name}: ")]
            assert len(written) == (name != "callbacks"), name
            assert all(f"  # {field.description}" in line for line in written)
            assert all(line.startswith("# ") == (name in PROMPT_FORMAT) for line in written)
        for heading in SFTConfig.sections.values():
            assert lines.count(f"# {heading}") == 1

    def test_keys_are_the_saved_ones(self):
        values = yaml.safe_load(SFTConfig.commented_yaml())
        assert set(values) == {"method", *SFTConfig.model_fields} - {"callbacks", *PROMPT_FORMAT}


def test_dump_keeps_the_order_of_keys():
    assert dump_yaml({"b": 1, "a": [1, "x"], "c": None}) == "b: 1\na: [1, x]\nc: null\n"


def test_base_config_reads_any_method_file_of_its_own_class(tmp_path):
    class OwnConfig(BaseConfig):
        method = "own"

    path = Path(tmp_path / "own.yaml")
    OwnConfig(lora_r=3).to_yaml(path)
    assert OwnConfig.from_yaml(path).lora_r == 3
    with pytest.raises(ConfigurationError, match="'own' is not 'sft'"):
        SFTConfig.from_yaml(path)


class TestHostileFiles:
    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("a: &x [1]\nb: *x", "run.yaml:2: not valid YAML (aliases are not read)"),
            (
                "a0: &a0 [a, a]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60)),
                "run.yaml:2: not valid YAML (aliases are not read)",
            ),
            ("a: &a [*a]", "aliases are not read"),
            ("a: !!python/object/apply:os.system ['touch marker']", "could not determine a constructor for the tag"),
            ("a: !!python/name:os.system", "could not determine a constructor for the tag"),
            ("!!python/object/new:subprocess.Popen [['touch', 'marker']]", "could not determine a constructor"),
            ("a: !!python/module:os", "could not determine a constructor"),
            ("a: !<tag:yaml.org,2002:python/object/apply:eval> ['1']", "could not determine a constructor"),
            ("a: " + "[" * 5000, "recursion"),
            ("a: " + "9" * 5000, "a number is too long"),
            ("a: " + "1:" * 100_000 + "1", "a number is too long"),
            ("a: 0x" + "f" * 100_000, "a number is too long"),
            ("a: !!bool maybe", "maybe"),
            ("a: !!timestamp never", "not valid YAML"),
            ("a: !!int ''", "not valid YAML"),
            ("? [a]\n: b", "unhashable"),
            ("#" * (2**20 + 1), "has more than 1,048,576 characters"),
        ],
    )
    def test_are_one_error(self, read, tmp_path, monkeypatch, text, reason):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ConfigurationError) as error:
            read(text)
        assert reason in str(error.value)
        assert len(str(error.value)) < 500
        assert not (tmp_path / "marker").exists()

    @settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.binary(max_size=200) | st.text(alphabet="{}[]:,-?&*!|>'\"%@`#\n\t a1.e~<=$", max_size=60))
    @example(b"method: sft\n\x00")
    @example("method: !!binary YQ==")
    @example("{1: 2, 1.0: 3}")
    def test_any_bytes(self, tmp_path, text):
        path = tmp_path / "run.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with contextlib.suppress(ConfigurationError):
            load_config(path)

    @settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        st.dictionaries(
            st.sampled_from(sorted(SFTConfig.model_fields)),
            st.recursive(
                st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(10**399) | st.dates(),
                lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
                max_leaves=5,
            ),
            max_size=4,
        )
    )
    def test_any_values(self, tmp_path, values):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({"method": "sft", **values}), encoding="utf-8")
        try:
            config = load_config(path)
        except ConfigurationError:
            return
        config.to_yaml(path)
        load_config(path)
