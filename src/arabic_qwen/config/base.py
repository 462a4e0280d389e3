"""The parameters that every training method shares."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

import pydantic
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from arabic_qwen.config.data import DataPath
from arabic_qwen.config.yaml_io import ConfigFile, dump_yaml, read_config_file
from arabic_qwen.errors import ConfigurationError
from arabic_qwen.files import write_atomically

Self = TypeVar("Self", bound="BaseConfig")

# YAML 1.1 reads a bare `no` as False.
Strategy = Annotated[Literal["no", "steps", "epoch"], BeforeValidator(lambda v: "no" if v is False else v)]
#: transformers' schedules that need no further arguments.
SchedulerName = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
]


def _check_path(text: str) -> str:
    if not text:
        raise ValueError("must not be empty")
    if "\0" in text:
        raise ValueError("holds a NUL character, which no path has")
    return text


#: A path or a hub id.
Text = Annotated[
    str,
    BeforeValidator(lambda v: os.fspath(v) if isinstance(v, os.PathLike) else v),
    AfterValidator(_check_path),
]
_MAX_SEED = 2**32 - 1  # numpy's


def _check_callback(value: Any) -> Any:
    if isinstance(value, type) or not hasattr(value, "on_train_begin"):
        raise ValueError("must be transformers.TrainerCallback objects, not classes or names")
    return value


Callback = Annotated[Any, BeforeValidator(_check_callback)]
TorchDtype = Annotated[
    Literal["auto", "bfloat16", "float16", "float32"],
    BeforeValidator(lambda v: str(v).removeprefix("torch.")),  # torch.bfloat16 itself is accepted too
]


#: What a later stage takes over from the run that it goes on from, where it is unset.
PROMPT_FORMAT = ("instruction_template", "response_template", "system_prompt", "normalize", "diacritics")

TEMPLATE_SUFFIXES = (".jinja", ".j2")


def _check_template(value: str) -> str:
    if value not in ("alpaca", "chatml", "tokenizer") and not value.endswith(TEMPLATE_SUFFIXES):
        raise ValueError("must be alpaca, chatml, tokenizer, or a path that ends in .jinja or .j2")
    return value


Template = Annotated[Text, AfterValidator(_check_template)]


def _check_normalize(value: Any) -> Any:
    if value in (None, False, True):
        return "train" if value else False
    if value != "train":
        raise ValueError("must be train or false; no other profile is for text that a model learns")
    return value


DiacriticsSetting = Literal["keep", "strip", "partial"]


def _check_diacritics(value: Any) -> Any:
    settings = value.values() if isinstance(value, dict) else [value]
    if not all(setting in get_args(DiacriticsSetting) for setting in settings):
        raise ValueError("must be keep, strip or partial, or a mapping from columns to these")
    return value


Diacritics = Annotated[DiacriticsSetting | dict[str, DiacriticsSetting], BeforeValidator(_check_diacritics)]


#: (whether a setting acts in a configuration, why it does not where it does not)
Condition = tuple[Callable[[Any], bool], str]

_OF_ADAPTERS = (
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "use_rslora",
    "use_dora",
    "init_lora_weights",
    "lora_bias",
    "merge_and_save",
)


class BaseConfig(BaseModel):
    """Model, data, LoRA, optimisation and run parameters; see each field's description.

    Unknown keys, bad values and contradictions raise :class:`ConfigurationError`, at construction and at
    assignment; a refused assignment leaves the old value in place.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True, protected_namespaces=(), allow_inf_nan=False)

    method: ClassVar[str]
    #: Heading printed before a field in the commented YAML of `arabic-qwen init`.
    sections: ClassVar[dict[str, str]] = {
        "model_name": "Model and data",
        "torch_dtype": "Precision and quantisation",
        "use_lora": "LoRA",
        "learning_rate": "Optimisation",
        "evaluation_strategy": "Evaluation and saving",
        "logging_steps": "Logging",
        "dataloader_num_workers": "Data loading and several GPUs",
    }

    #: Settings that act only where others let them: (whether it acts, why it does not).
    acts_where: ClassVar[dict[str, Condition]] = {
        **dict.fromkeys(_OF_ADAPTERS, (lambda config: config.use_lora, "use_lora is false")),
        "response_template": (
            lambda config: config.instruction_template == "alpaca",
            "it belongs to instruction_template alpaca",
        ),
        "validation_split": (lambda config: config.eval_dataset_path is None, "eval_dataset_path names other rows"),
        "num_train_epochs": (lambda config: config.max_steps is None, "max_steps says how long training is"),
        "warmup_ratio": (
            lambda config: config.lr_scheduler_type != "constant",
            "lr_scheduler_type constant has no warm-up",
        ),
        "eval_steps": (lambda config: config.evaluation_strategy == "steps", "evaluation_strategy is not steps"),
        "save_steps": (lambda config: config.save_strategy == "steps", "save_strategy is not steps"),
        "metric_for_best_model": (lambda config: config.load_best_model_at_end, "load_best_model_at_end is false"),
        "early_stopping_threshold": (
            lambda config: config.early_stopping_patience is not None,
            "early_stopping_patience is null",
        ),
    }

    model_name: Text = Field(
        default="Qwen/Qwen2.5-7B", description="Hub id, local folder, or the output folder of an earlier run"
    )
    dataset_path: DataPath = Field(
        default="data/training.jsonl",
        description="Training data: file, folder, hub id (org/name), sample:sft, or a list of these (docs/data.md)",
    )
    eval_dataset_path: DataPath | None = Field(
        default=None, description="Validation data, as dataset_path; unset: validation_split of the training data"
    )
    validation_split: float = Field(
        default=0.1, ge=0, lt=1, description="Share of rows held out for validation, chosen by data_seed"
    )
    dataset_split: str = Field(default="train", description="Split of hub and save_to_disk sets that have several")
    dataset_config: str | None = Field(default=None, description="Configuration (subset) of hub sets that have several")
    column_map: dict[str, str] = Field(
        default={},
        description="Our column: yours, as in {instruction: question, response: answer}; others are not read",
    )
    max_samples: int | None = Field(
        default=None,
        ge=1,
        description="Rows used at most, of training and validation data each, chosen by data_seed; null: all",
    )
    max_bad_rows: int = Field(
        default=0,
        ge=0,
        description="Rows that cannot be trained on and may be left out (into bad_rows.jsonl); more: an error",
    )
    normalize: Annotated[Literal["train", False], BeforeValidator(_check_normalize)] = Field(
        default="train",
        description="Normalise Arabic text by this profile (docs/arabic_data.md); false: read it as it is",
    )
    diacritics: Diacritics = Field(
        default="keep",
        description="keep, strip or partial (keeps shadda and tanwin), for all text or by column: "
        "{instruction: strip, output: keep}",
    )
    streaming: bool = Field(
        default=False,
        description="Read training rows as training goes on, for data larger than memory; needs max_steps",
    )
    output_dir: Text = Field(
        default="./checkpoints", description="Where the run is written; unset: ./checkpoints/<method>"
    )
    instruction_template: Template = Field(
        default="alpaca",
        description="Prompt format: alpaca, chatml, tokenizer (its own chat template), or a path *.jinja",
    )
    response_template: str = Field(
        default="### Response:\n", description="What precedes the answer in the alpaca template"
    )
    system_prompt: str | None = Field(default=None, description="System prompt of conversations that have none")
    overwrite_output_dir: bool = Field(
        default=False, description="Discard the run that output_dir holds and start again"
    )
    resume_from_checkpoint: Text = Field(
        default="auto",
        description="auto: go on with the run that output_dir holds; never: set it aside and start again; "
        "or the checkpoint folder to go on from",
    )
    resume_changed: bool = Field(
        default=False, description="Go on also where settings or data differ from those of the run so far"
    )

    max_seq_length: int = Field(
        default=512, ge=8, description="Longest sequence, in tokens; longer ones are cut at the end and counted"
    )
    torch_dtype: TorchDtype = Field(
        default="bfloat16",
        description="Precision of frozen weights and of computation; auto: the best that the device computes fast",
    )
    bf16: bool = Field(default=False, description="Compute in bfloat16 whatever torch_dtype says")
    fp16: bool = Field(default=False, description="Compute in float16 whatever torch_dtype says (CUDA only)")
    load_in_4bit: bool = Field(default=False, description="NF4-quantised base model (needs bitsandbytes)")
    load_in_8bit: bool = Field(default=False, description="int8-quantised base model (needs CUDA and bitsandbytes)")
    base_precision: Literal["fp8"] | None = Field(
        default=None,
        description="fp8: frozen linear layers compute in 8-bit floating point, faster (Ada, Hopper or newer GPU); "
        "null: torch_dtype",
    )
    use_flash_attention: bool = Field(
        default=True, description="Variable-length flash attention on CUDA; false: PyTorch SDPA per sequence"
    )

    torch_compile: bool | Literal["auto"] = Field(
        default="auto",
        description="Compile the model's layers: a minute or two, then faster; auto: for long runs on a GPU",
    )

    use_lora: bool = Field(default=True, description="Train LoRA adapters; false: train all weights")
    lora_r: int = Field(default=16, ge=1, description="Rank of the adapters")
    lora_alpha: int = Field(default=32, ge=1, description="Scale of the adapters: alpha / r")
    lora_dropout: float = Field(default=0.1, ge=0, lt=1, description="Dropout on the adapters' input")
    lora_target_modules: Annotated[list[str], Field(min_length=1)] | Literal["all-linear"] = Field(
        default=["q_proj", "v_proj"], description="Names of the linear layers that get adapters, or all-linear"
    )
    use_rslora: bool = Field(default=False, description="Scale the adapters by alpha / sqrt(r): for high ranks")
    use_dora: bool = Field(
        default=False, description="DoRA: learn the weights' magnitude apart from their direction; slower"
    )
    init_lora_weights: Literal["default", "gaussian", "pissa", "pissa_niter_16", "olora"] = Field(
        default="default",
        description="Where adapters start: at zero, or (pissa, olora) from the weights' main components",
    )
    lora_bias: Literal["none", "all", "lora_only"] = Field(default="none", description="Biases to train")
    lora_task_type: Literal["CAUSAL_LM"] = Field(default="CAUSAL_LM", description="PEFT task type")
    merge_and_save: bool = Field(
        default=False, description="Save the model with the adapters merged into it, instead of adapters only"
    )

    learning_rate: float = Field(default=2e-4, gt=0, description="Peak learning rate")
    num_train_epochs: int | float = Field(
        default=3, gt=0, description="Passes over the training set", json_schema_extra={"exclusiveMinimum": 0}
    )
    max_steps: int | None = Field(default=None, ge=1, description="Optimizer steps; null: from num_train_epochs")
    per_device_train_batch_size: int = Field(
        default=4, ge=1, description="Training sequences per device and accumulation step"
    )
    per_device_eval_batch_size: int = Field(default=8, ge=1, description="Evaluation sequences per device and step")
    gradient_accumulation_steps: int = Field(default=1, ge=1, description="Batches per optimizer step")
    token_budget: int | None = Field(
        default=None,
        ge=1,
        description="Tokens computed at a time; changes speed and memory, never results; unset: what fits",
    )
    lr_scheduler_type: SchedulerName = Field(
        default="linear", description="Learning-rate schedule, by its transformers name"
    )
    warmup_ratio: float = Field(
        default=0.1, ge=0, lt=1, description="Share of the steps in which the learning rate rises"
    )
    optim: Literal["adamw", "adamw_8bit"] = Field(
        default="adamw", description="Optimizer; adamw_8bit keeps its moments in 8 bits (needs CUDA and bitsandbytes)"
    )
    weight_decay: float = Field(default=0.01, ge=0, description="AdamW weight decay")
    max_grad_norm: float = Field(default=1.0, ge=0, description="Gradient-norm clipping; 0: none")
    loss_spikes: Literal["log", "skip"] = Field(
        default="log",
        description="Steps whose loss is far above those before: log them with their rows, or skip their updates",
    )
    gradient_checkpointing: bool | Literal["auto"] = Field(
        default=True,
        description="Recompute activations in the backward pass to save memory; auto: in as few layers as memory needs",
    )
    seed: int = Field(default=42, ge=0, le=_MAX_SEED, description="Seed of initialisation and dropout")
    data_seed: int | None = Field(
        default=42, ge=0, le=_MAX_SEED, description="Seed of the split and the data order; null: seed"
    )

    evaluation_strategy: Strategy = Field(default="steps", description="When to evaluate: no, steps, epoch")
    eval_steps: int = Field(default=500, ge=1, description="Steps between evaluations")
    eval_samples: int = Field(
        default=4,
        ge=0,
        description="Held-out prompts that the model answers at each evaluation (into samples.jsonl); 0: none",
    )
    dialect_model: Text | None = Field(
        default=None,
        description="Dialect classifier, a file of `arabic-qwen data fit-dialects`; null: the one that comes along",
    )
    save_strategy: Strategy = Field(default="steps", description="When to save checkpoints: no, steps, epoch")
    save_steps: int = Field(default=1000, ge=1, description="Steps between checkpoints")
    save_total_limit: int | None = Field(default=3, ge=1, description="Checkpoints kept; null: all")
    load_best_model_at_end: bool = Field(default=True, description="End with the checkpoint that evaluated best")
    metric_for_best_model: str = Field(default="eval_loss", description="Metric that decides which is best")
    early_stopping_patience: int | None = Field(
        default=3, ge=1, description="Evaluations without improvement before stopping; null: never"
    )
    early_stopping_threshold: float = Field(
        default=0.0, ge=0, description="Smallest change of the metric that counts as improvement"
    )

    logging_steps: int = Field(default=10, ge=1, description="Steps between log lines")
    report_to: str | list[str] = Field(
        default="none", description="Also log to wandb, tensorboard or mlflow (extras of these names)"
    )
    run_name: str | None = Field(default=None, description="Name of the run in those services")
    callbacks: list[Callback] = Field(
        default_factory=list, exclude=True, description="Further transformers.TrainerCallback objects (Python only)"
    )

    dataloader_num_workers: int = Field(
        default=0, ge=0, description="Processes that pack batches ahead of the training step"
    )
    dataloader_pin_memory: bool = Field(default=True, description="Page-locked batches, for faster copies to CUDA")
    group_by_length: bool = Field(default=False, description="Put sequences of similar length into one batch")
    length_column_name: str = Field(
        default="length", description="Column with the token count in datasets given to custom trainers"
    )
    ddp_backend: Literal["nccl", "gloo", "mpi", "ccl", "hccl", "cncl", "mccl"] | None = Field(
        default=None, description="Backend of torch.distributed; null: by device"
    )
    ddp_find_unused_parameters: bool | None = Field(default=None, description="Passed to DistributedDataParallel")
    deepspeed: Text | None = Field(default=None, description="DeepSpeed configuration file")

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except pydantic.ValidationError as error:
            raise self._translate(error) from None

    def __setattr__(self, name: str, value: Any) -> None:
        before, set_before = dict(self.__dict__), set(self.__pydantic_fields_set__)
        try:
            super().__setattr__(name, value)
        except pydantic.ValidationError as error:
            self.__dict__.update(before)
            object.__setattr__(self, "__pydantic_fields_set__", set_before)
            raise self._translate(error) from None

    @pydantic.model_validator(mode="after")
    def _check_combinations(self: Self) -> Self:
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit are both true; set one of them to false")
        if (self.load_in_4bit or self.load_in_8bit) and not self.use_lora:
            raise ValueError("a quantised model can only be trained with adapters; set use_lora to true")
        if self.base_precision == "fp8":
            self._check_fp8()
        if self.streaming and self.max_steps is None:
            raise ValueError("streaming does not know how many rows there are; set max_steps")
        for name in ("max_samples", "precompute_reference"):
            if self.streaming and getattr(self, name, None):
                raise ValueError(f"{name} needs all rows at once; unset it, or set streaming to false")
        if self.init_lora_weights.startswith(("pissa", "olora")):
            for name in ("load_in_4bit", "load_in_8bit", "use_dora"):
                if getattr(self, name):
                    raise ValueError(
                        f"init_lora_weights {self.init_lora_weights!r} changes the base model's weights, which "
                        f"{name} does not allow; set init_lora_weights to default or {name} to false"
                    )
        return self

    def _check_fp8(self) -> None:
        if not self.use_lora:
            raise ValueError(
                "base_precision fp8 is for frozen weights, which use_lora false has none of; set it to null"
            )
        for name in ("load_in_4bit", "load_in_8bit", "use_dora", "lora_bias", "deepspeed"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"base_precision fp8 does not go with {name}; unset one of them")

    @classmethod
    def _unknown_key(cls, name: str) -> ConfigurationError:
        close = difflib.get_close_matches(name, cls.model_fields, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "`arabic-qwen init " + cls.method + "` lists the keys"
        return ConfigurationError(f"{name}: unknown key of {cls.__name__}; {hint}")

    @classmethod
    def _translate(cls, error: pydantic.ValidationError) -> ConfigurationError:
        """All problems of a pydantic error, one a line; one of a value that is refused by several types of a field."""
        problems: dict[tuple[str, str], list[str]] = {}
        for item in error.errors():
            key = str(item["loc"][0]) if item["loc"] else ""
            message = item["msg"].removeprefix("Value error, ").partition(", unable to")[0]
            message = message[0].lower() + message[1:]
            if item["type"] in ("extra_forbidden", "no_such_attribute"):
                problems[str(cls._unknown_key(key)), ""] = []
            elif not key:
                problems[message, ""] = []
            else:
                refusals = problems.setdefault((f"{key}: ", f", got {item['input']!r}"), [])
                refusals.append(message.removeprefix("input should be " if refusals else ""))
        lines = [start + " or ".join(dict.fromkeys(refusals)) + end for (start, end), refusals in problems.items()]
        return ConfigurationError("\n".join(lines))

    def notices(self) -> list[str]:
        """What to say of settings that differ from their default and do nothing, as the others are."""
        said = []
        for name, (acts, reason) in self.acts_where.items():
            default = type(self).model_fields[name].get_default(call_default_factory=True)
            value = getattr(self, name)
            if value != default and not acts(self):
                said.append(f"{name}: {value!r} does nothing here: {reason}")
        return said

    @property
    def length_key(self) -> str:
        """The setting that limits the tokens of a prompt with its answer."""
        return "max_seq_length"

    @property
    def sequence_capacity(self) -> int | None:
        """Tokens that a training sequence is filled up to with several examples; None: it is one example."""
        return None

    @property
    def resolved_output_dir(self) -> str:
        """`output_dir`, or `./checkpoints/<method>` where it was left unset."""
        return self.output_dir if "output_dir" in self.model_fields_set else f"./checkpoints/{self.method}"

    @classmethod
    def from_yaml(cls: type[Self], path: str | os.PathLike, overrides: list[str] | None = None) -> Self:
        """Read a YAML file; `overrides` are `key=value` strings that win over it.

        `${NAME}` and `${NAME:-default}` in values are replaced from the environment.

        Raises:
            ConfigurationError: the file is missing or not YAML, is for another method, or has bad keys or values.
        """
        file = read_config_file(path, overrides or [])
        method = file.values.pop("method", cls.method)
        if method != cls.method:
            problem = f"method: {method!r} is not {cls.method!r}, which {cls.__name__} is for"
            raise ConfigurationError(file.locate(problem))
        return cls.from_file(file)

    @classmethod
    def from_file(cls: type[Self], file: ConfigFile) -> Self:
        """Build from what was read; errors name the line or the override that is wrong."""
        if "callbacks" in file.values:
            raise ConfigurationError(file.locate("callbacks: are Python objects; set them in Python"))
        try:
            return cls(**file.values)
        except ConfigurationError as error:
            raise ConfigurationError("\n".join(map(file.locate, str(error).splitlines()))) from None

    def to_yaml(self, path: str | os.PathLike) -> None:
        """Write every value except `callbacks` and an unset `output_dir`; `from_yaml` reads it back equal."""
        values = {"method": self.method, **self.model_dump()}
        if "output_dir" not in self.model_fields_set:
            del values["output_dir"]
        write_atomically(path, dump_yaml(values))

    @classmethod
    def commented_yaml(cls) -> str:
        """All fields with their defaults and descriptions, as YAML to edit."""
        lines = [f"method: {cls.method}"]
        for name, field in cls.model_fields.items():
            if field.exclude:
                continue
            if name in cls.sections:
                lines += ["", f"# {cls.sections[name]}"]
            default = f"./checkpoints/{cls.method}" if name == "output_dir" else field.default
            line = f"{dump_yaml({name: default}).rstrip()}  # {field.description}"
            lines.append(f"# {line}; unset: an earlier run's" if name in PROMPT_FORMAT else line)
        return "\n".join(lines) + "\n"
