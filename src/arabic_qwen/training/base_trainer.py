"""The pipeline that every training method shares, in the order in which it runs."""

from __future__ import annotations

import gc
import logging
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import MLflowCallback
from transformers.utils.logging import disable_progress_bar

from arabic_qwen.config import BaseConfig, SFTConfig, load_config
from arabic_qwen.config.base import PROMPT_FORMAT, TEMPLATE_SUFFIXES
from arabic_qwen.data.dataset import GroupDataset
from arabic_qwen.data.dialects import tag_dialects
from arabic_qwen.data.loaders import DataLoader, to_padded
from arabic_qwen.data.stream import GroupStream
from arabic_qwen.data.templates import set_template, stop_token_ids
from arabic_qwen.engine import arguments
from arabic_qwen.engine.callbacks import run_callbacks
from arabic_qwen.engine.guards import make_resumable
from arabic_qwen.engine.reference_cache import precompute
from arabic_qwen.engine.trainer import PackedTrainer
from arabic_qwen.errors import ConfigurationError, DatasetError, TrainingError
from arabic_qwen.files import staged
from arabic_qwen.generation.respond import GenerationMixin
from arabic_qwen.generation.samples import Samples
from arabic_qwen.memory.fit import default_budget
from arabic_qwen.methods.registry import METHODS
from arabic_qwen.models import adapters, compilation, loading, precision, sources
from arabic_qwen.models.reference import reference_policy
from arabic_qwen.runs import run_folder
from arabic_qwen.runs.report import model_card
from arabic_qwen.runs.signals import StopOnSignal

_TIMINGS = ("_runtime", "_per_second", "_time")


class BaseTrainer(GenerationMixin):
    """Trains, evaluates, saves, loads and generates with one model.

    The method follows from the configuration's class. A subclass may override :meth:`_get_training_method` and
    :meth:`create_trainer` to bring a method of its own, on any `transformers.Trainer`.

    Args:
        config: a configuration class, or any object with attributes of the same names. Attributes that are missing
            get their defaults, except `model_name` and `dataset_path`.

    Raises:
        ConfigurationError: (a ValueError) `model_name` or `dataset_path` is missing, or a value is bad.
    """

    #: The configuration that a subclass needs; None: any, and SFTConfig's defaults for other objects.
    config_class: type[BaseConfig] | None = None

    def __init__(self, config: Any):
        if self.config_class and isinstance(config, BaseConfig) and not isinstance(config, self.config_class):
            raise ConfigurationError(
                f"{type(self).__name__} needs a {self.config_class.__name__}, not a {type(config).__name__}"
            )
        for name in ("model_name", "dataset_path"):
            if not hasattr(config, name):
                raise ConfigurationError(f"{name} is required")
        if not isinstance(config, BaseConfig):
            for name, field in (self.config_class or SFTConfig).model_fields.items():
                if not hasattr(config, name):
                    setattr(config, name, field.get_default(call_default_factory=True))
        self.config = config
        self._validated()
        self.logger = logging.getLogger(self.__class__.__name__)
        if not sys.stderr.isatty():
            disable_progress_bar()
        self.model: Any = None  # PreTrainedModel, or PeftModel around one
        self.tokenizer: Any = None  # PreTrainedTokenizerBase
        self.trainer: Trainer | None = None
        self.data_loader: DataLoader | None = None
        self.dataset: dict[str, Any] | None = None
        self._loaded_from: str | None = None  # by load_model()
        self._start: str = ""  # what the model in memory was before its training
        self._model_is_trainable = True
        self._came_with_adapters = False
        self.metrics: dict[str, float] = {}
        self.samples: list[dict[str, Any]] = []  # answers to held-out prompts, by the trained model
        self.logger.info("Initialized %s", self.__class__.__name__)

    def _get_training_method(self) -> str:
        """Name of the training method: "sft"; anything that is not ours needs its own :meth:`create_trainer`."""
        return self._validated().method

    def _validated(self) -> BaseConfig:
        """The configuration as a class of ours; bad values raise ConfigurationError."""
        if isinstance(self.config, BaseConfig):
            return self.config
        given = {}
        config_class = self.config_class or SFTConfig
        for name, field in config_class.model_fields.items():
            value = getattr(self.config, name)
            if value != field.get_default(call_default_factory=True):
                given[name] = value
        return config_class(**given)

    @property
    def _source(self) -> str:
        """Where the model is loaded from."""
        return self._loaded_from or self.config.model_name

    def _inherit_prompt_format(self, model_path: str, keep: set[str]) -> BaseConfig | None:
        """Take over how an earlier run's output was prompted, but for the fields in `keep`; give that run's settings."""
        if not sources.is_run_output(model_path):
            return None
        saved = load_config(Path(model_path, sources.RUN_CONFIG))
        own = saved.instruction_template.endswith(TEMPLATE_SUFFIXES)
        # The tokenizer was saved with it; the file may be gone.
        prompt_format = saved.model_copy(update={"instruction_template": "tokenizer"}) if own else saved
        for name in set(PROMPT_FORMAT) - keep:
            setattr(self.config, name, getattr(prompt_format, name))
        return saved

    # ---------------------------------------------------------------- the pipeline

    def train(self) -> None:
        """Run the whole pipeline and save the result in `output_dir`.

        A run that stopped on the way goes on from its newest checkpoint; a finished one is loaded and left as it is.

        Raises:
            ConfigurationError, ModelLoadError, DatasetError: see the steps.
            KeyboardInterrupt: Ctrl-C was pressed; the running step was finished and saved first.
            SystemExit: (143) the same for SIGTERM and SIGUSR1.
        """
        self._inherit_prompt_format(self._source, keep=self._validated().model_fields_set)
        run = run_folder.find_run(self._validated())
        if run.finished:
            self.logger.warning(
                "%s holds this run, finished; set overwrite_output_dir to true to repeat it", run.folder
            )
            self.load_model(str(run.folder))
            self.metrics = run_folder.read_summary(run.folder)["metrics"]
            return

        self.trainer, self.dataset = self.prepare()
        sums = run_folder.data_sums(self.dataset)
        # Only now: a run that cannot start leaves no folder behind.
        with StopOnSignal() as stop, run_folder.begin_run(run, self._validated(), sums) as checkpoint:
            make_resumable(self.trainer, self._validated(), sums, stop)
            if self.data_loader:
                self.data_loader.bad_rows.keep()
            if checkpoint:
                self.logger.warning("Going on from %s", checkpoint)
            if isinstance(self.trainer, PackedTrainer) and self.trainer.can_sample and self.config.eval_samples:
                self.trainer.samples = Samples(self._validated(), self.dataset["validation"], self.tokenizer)
            result = self.trainer.train(resume_from_checkpoint=checkpoint)

            self.trainer.remove_callback(MLflowCallback)  # its run has ended; the evaluation would start another
            samples = getattr(self.trainer, "samples", None)
            if samples and self.trainer.args.load_best_model_at_end:
                samples.best_step = self.trainer.state.best_global_step
            if "validation" in self.dataset:
                self.evaluate()
            if samples:
                self.samples = samples.latest
                self.trainer.samples = None  # type: ignore[attr-defined]  # later evaluations are not the run's
            self.save_model()
            if self.trainer.is_world_process_zero():
                summary = {"metrics": self.metrics, "train": result.metrics, "data": self._data_summary()}
                run_folder.finish_run(run.folder, summary)
        self.logger.info("Saved to %s", run.folder)

    def prepare(self) -> tuple[Trainer, dict[str, Any]]:
        """Everything before the first step: model, adapters, data, arguments, callbacks; the trainer and its dataset.

        Raises:
            ConfigurationError, ModelLoadError, DatasetError: see the steps.
        """
        arguments.check_machine(self._validated())
        for notice in self._validated().notices():
            self.logger.warning(notice)
        if not self._model_is_trainable:  # load_model() brought it in for generation
            self.model = None
        self.setup_model_and_tokenizer()
        if self.config.use_lora:
            if self._came_with_adapters:
                self.logger.warning("%s has adapters, which training goes on with; lora_* are theirs", self._source)
            self.setup_lora()
        elif self.config.learning_rate > 1e-4:
            self.logger.warning(
                "learning_rate: %g suits adapters; all weights usually take 1e-5", self.config.learning_rate
            )
        self.dataset = dataset = self.load_and_validate_dataset()
        if self.data_loader:
            self.data_loader.check_length(self._source, loading.positions(self.model.config))
        trainer = self.create_trainer(dataset, self.get_training_arguments(), self.get_callbacks())
        trainer.remove_callback(PrinterCallback)  # ProgressDisplay has said it
        return trainer, dataset

    def setup_model_and_tokenizer(self) -> None:
        """Load model and tokenizer as `model_name`, precision and quantisation say; nothing if they are there.

        `model_name` may be an earlier output: training then goes on with its weights or adapters.

        Raises:
            ModelLoadError: they cannot be loaded.
            ConfigurationError: this machine lacks the precision or quantisation asked for.
        """
        if self.model is None:
            self._setup_tokenizer()
            self._load(trainable=True)

    def _load(self, trainable: bool) -> None:
        config = self._validated()
        _, reason = precision.explained_dtype(config)
        if reason:
            self.logger.log(logging.INFO if config.torch_dtype == "auto" else logging.WARNING, reason)
        self.model = self._reference = None
        gc.collect()  # methods of ours on an earlier model's layers hold on to them
        self.model = loading.load_model(self._source, config, trainable=trainable)
        self._model_is_trainable = trainable
        self._came_with_adapters = isinstance(self.model, PeftModel)
        if trainable:
            self._start = self._source
        self._setup_padding_token()
        self.model.generation_config.eos_token_id = stop_token_ids(self.tokenizer)
        self.model.generation_config.pad_token_id = self.tokenizer.pad_token_id

    def _setup_tokenizer(self) -> None:
        if self.tokenizer is None:
            self._inherit_prompt_format(self._source, keep=self._validated().model_fields_set)
            self.tokenizer = loading.load_tokenizer(self._source)
            saved = self.tokenizer.chat_template
            set_template(self.tokenizer, self.config.instruction_template, self.config.response_template)
            if sources.is_run_output(self._source) and self.tokenizer.chat_template != saved:
                self.logger.warning("instruction_template: %s had another; unset it to keep that one", self._source)
            self._setup_padding_token()

    def _setup_padding_token(self) -> None:
        """Pad with the end token if there is no pad token, end with the unknown token if there is no end token.

        Grows the embedding where the tokenizer has more tokens than it; adapters are trained with the new rows.

        Raises:
            ConfigurationError: the tokenizer has neither.
        """
        tokenizer = self.tokenizer
        if tokenizer.eos_token is None:
            if tokenizer.unk_token is None:
                raise ConfigurationError(
                    f"{self._source}: the tokenizer has neither an end nor an unknown token; "
                    "set eos_token in its tokenizer_config.json"
                )
            tokenizer.eos_token = tokenizer.unk_token
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        added = adapters.grow_embedding(self.model, len(tokenizer)) if self.model is not None else 0
        if added:
            self.logger.info("%d tokens are new to the model; they start as the mean of the others", added)

    def setup_lora(self) -> None:
        """Add LoRA adapters to the model; one that has adapters already (an earlier output) goes on with those.

        Raises:
            ConfigurationError: `lora_target_modules` names layers that the model lacks.
        """
        self.setup_model_and_tokenizer()
        if not isinstance(self.model, PeftModel):
            self.model = adapters.add_lora(self.model, self.config)

    def get_data_loader(self) -> DataLoader:
        """The data loader of the training method; methods that are not ours read supervised data."""
        self._setup_tokenizer()
        method = self._get_training_method()
        method = method if method in METHODS else "sft"
        self.data_loader = METHODS[method].data_loader(self._validated(), self.tokenizer)
        earlier = self._inherit_prompt_format(self._source, keep=set(PROMPT_FORMAT))
        self.data_loader.check_columns = earlier is None or earlier.diacritics != self.config.diacritics
        return self.data_loader

    def load_and_validate_dataset(self) -> dict[str, Any]:
        """Read, check and encode the data: {"train": …, "validation": …}, without the latter where it has no rows.

        For a method that is not ours the splits are `datasets.Dataset` with padded `input_ids`, `attention_mask`
        and `labels`.

        Raises:
            DatasetError: a file cannot be read, or has rows that cannot be trained on.
        """
        splits = self.get_data_loader().load().items()
        return {name: self._for_trainer(split, held_out=name == "validation") for name, split in splits}

    def _for_trainer(self, split: Any, held_out: bool) -> Any:
        if self._get_training_method() in METHODS:
            if held_out:
                tag_dialects(split, self.tokenizer, self.config.dialect_model)
            return split
        if isinstance(split, GroupStream):
            raise ConfigurationError(f"streaming: works with {', '.join(METHODS)}; set it to false for other methods")
        return to_padded(split, self.tokenizer.pad_token_id, self.config.length_column_name)

    def get_training_arguments(self) -> TrainingArguments:
        """The configuration in transformers' terms; contradictions are resolved and said in one log line.

        Raises:
            ConfigurationError: transformers refuses a value, or a package that it needs is missing.
        """
        config, schedule = self._validated(), self._schedule()
        if schedule.changes:
            self.logger.warning("Resolved: %s", "; ".join(schedule.changes))
        return arguments.training_arguments(config, schedule)

    def _schedule(self) -> arguments.Schedule:
        config = self._validated()
        planned = bool(config.eval_dataset_path or (config.validation_split and not config.streaming))
        return arguments.resolve_schedule(config, "validation" in self.dataset if self.dataset else planned)

    def get_callbacks(self) -> list[TrainerCallback]:
        """Progress, metrics file and loss curve, early stopping where it can work, then `config.callbacks`."""
        return run_callbacks(self._validated(), self._schedule())

    def create_trainer(
        self, dataset: Mapping[str, Any], training_args: TrainingArguments, callbacks: list[TrainerCallback]
    ) -> Trainer:
        """The packed engine with the method's objective; overridden for methods that are not ours.

        Raises:
            NotImplementedError: the method is not ours and the subclass does not override this.
        """
        method = self._get_training_method()
        if method not in METHODS:
            raise NotImplementedError(f"{type(self).__name__} must override create_trainer for its method {method!r}")
        config = self._validated()
        objective = METHODS[method].make_objective(config)
        known = ["eval_loss", *(f"eval_{name}" for name in objective.metric_names)]
        if training_args.load_best_model_at_end and config.metric_for_best_model not in known:
            raise ConfigurationError(
                f"metric_for_best_model: {config.metric_for_best_model!r} is not measured; choose from {', '.join(known)}"
            )
        if compilation.should_compile(config, self.model, arguments.planned_tokens(config, dataset)):
            compilation.compile_packed(self.model)
        reference = None
        if objective.needs_reference:
            reference = reference_policy(self.model, self._start, config, self.tokenizer)
            if getattr(config, "precompute_reference", False):
                groups = [split.groups for split in dataset.values()]
                cache, budget = Path(config.resolved_output_dir), config.token_budget or default_budget()
                with precision.autocast(config):
                    known_splits = precompute(groups, self.model, reference, cache, budget)
                for split, groups in zip(dataset.values(), known_splits, strict=True):
                    split.groups = groups
        return PackedTrainer(
            objective=objective,
            reference=reference,
            token_budget=config.token_budget,
            loss_spikes=config.loss_spikes,
            fits_recompute=config.gradient_checkpointing == "auto",
            sequence_capacity=config.sequence_capacity,
            model=self.model,
            args=training_args,
            train_dataset=dataset["train"],
            eval_dataset=dataset.get("validation"),
            processing_class=self.tokenizer,
            callbacks=callbacks,
        )

    # ---------------------------------------------------------------- saving and loading

    def save_model(self, output_dir: str | None = None) -> None:
        """Save adapters or the full model (merged with `merge_and_save`), tokenizer, configuration and model card.

        Args:
            output_dir: folder to write; None: the run's.
        """
        if self.model is None:
            raise TrainingError("there is no model to save; call train() or load_model() first")
        if self.trainer is not None and not self.trainer.is_world_process_zero():
            return
        config = self._validated()
        folder = Path(output_dir or config.resolved_output_dir)
        make = output_dir is not None or self.trainer is None  # a run has made its own
        with staged(folder, loading.saved_bytes(self.model, whole=config.merge_and_save), make) as stage:
            adapter = loading.save_model(self.model, config, stage)
            self.tokenizer.save_pretrained(stage)
            config.model_copy(update={"output_dir": str(folder)}).to_yaml(stage / sources.RUN_CONFIG)
            card = model_card(config, self.metrics, self._data_summary(), self.samples, adapter=adapter)
            (stage / "README.md").write_text(card, encoding="utf-8")

    def _data_summary(self) -> dict[str, str]:
        """One line on each split, and on what was left out."""
        lines = {
            name: split.summary() if hasattr(split, "summary") else f"{len(split):,} examples"
            for name, split in (self.dataset or {}).items()
        }
        if self.data_loader and len(self.data_loader.bad_rows):
            lines["bad rows"] = self.data_loader.bad_rows.summary()
        return lines

    def load_model(self, model_path: str) -> None:
        """Load a model or adapter to generate, to evaluate, or to train on.

        From the output folder of an earlier run its prompt format and system prompt are restored too; so are precision
        and quantisation, unless this configuration sets them or this machine lacks them.

        Raises:
            ModelLoadError: it cannot be loaded.
        """
        saved = self._inherit_prompt_format(model_path, keep=set())
        self._start = saved.model_name if saved else self.config.model_name
        if saved:
            quantized = sources.is_adapter(model_path) and self.config.use_lora
            problem = precision.inherit(self.config, self._validated().model_fields_set, saved, quantized)
            if problem:
                self.logger.warning("%s: not loaded as it was trained (%s)", model_path, problem)
        self.tokenizer, self.trainer = None, None
        self._loaded_from = model_path
        self._setup_tokenizer()
        self._load(trainable=False)

    # ---------------------------------------------------------------- evaluation and generation

    def evaluate(self, eval_dataset: Iterable[Mapping[str, Any]] | str | None = None) -> dict[str, float]:
        """Metrics on a dataset: `eval_loss`, and what the method measures (`eval_perplexity`, `eval_rewards/…`).

        Args:
            eval_dataset: rows in any layout that training reads (a `datasets.Dataset`, a list of dicts), the path of
                a file, or a split of :meth:`load_and_validate_dataset`; None: the validation split.

        Raises:
            DatasetError: there are no validation rows, or rows that cannot be read.
        """
        self.setup_model_and_tokenizer()
        adapts = self.config.use_lora and self._model_is_trainable  # as train() will, which may convert the base
        if adapts or getattr(self.model, "is_quantized", False):
            self.setup_lora()  # Trainer takes no purely quantised model; new adapters change nothing
        split: Any = eval_dataset
        if eval_dataset is None:
            self.dataset = self.dataset or self.load_and_validate_dataset()
            split = self.dataset.get("validation")
            if split is None:
                raise DatasetError("there are no validation rows; set validation_split or eval_dataset_path")
        elif not isinstance(eval_dataset, GroupDataset) and "input_ids" not in getattr(
            eval_dataset, "column_names", ()
        ):
            split = self._for_trainer(self.get_data_loader().encode(eval_dataset), held_out=True)
        if self.trainer is None:
            self.trainer = self.create_trainer({"train": split, "validation": split}, self.get_training_arguments(), [])
            self.trainer.remove_callback(PrinterCallback)
        measured = self.trainer.evaluate(split)
        metrics = {k: v for k, v in measured.items() if k.startswith("eval_") and not k.endswith(_TIMINGS)}
        if eval_dataset is None:
            self.metrics = metrics
        return metrics
