"""Every setting, declared once: the same dataclasses give the flags, the YAML keys, ``--help`` and config.yaml.

:mod:`voxtral_dist.command_line` reads them.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

import yaml

from voxtral_dist.errors import UserError

CommaList = str | list[str]


@dataclasses.dataclass
class DataConfig:
    """Settings that training and evaluation share.

    Attributes:
        model_id: a Voxtral folder or hub id, for example mistralai/Voxtral-Mini-3B-2507
        output_dir: the run directory; everything that is written goes there
        val_shards: packed dev sets, comma separated folders (each holds a manifest.json) or https and s3 URLs
        val_jsonl: dev sets as JSONL, comma separated; packed into the output directory first
        shard_cache: a local folder for copies of shards that are read from a URL or slow storage; empty: none
        shard_cache_gb: most GB that its tars may take together
        tasks: task of each data file in order, comma separated (asr, sqa, tqa); empty: detected by the keys
        sqa_question: 'written': the question follows the audio; 'spoken': the audio is the question
        per_device_bsz: examples per rank and micro-batch; packed rows take more short ones, up to the positions below
        max_tokens_per_micro_batch: positions of one forward pass, padding and, in decoding, the answers included;
            0: per_device_bsz x max_len
        max_len: language-model positions an example may take, audio included
        load_in_4bit: keep the language model's frozen linears in 4 bits (NF4); needs the extra voxtral-dist[4bit]
        bf16: bfloat16 for the frozen model and the matrix products; default: yes on a GPU, no on a CPU
        tf32: let fp32 matrix products use TF32 on CUDA
        num_workers: threads per rank that read and decode examples
        private_text: keep transcripts and answers out of TensorBoard and the console
        seed: of the data order, the initial adapter and the dropout
    """

    model_id: str = ""
    output_dir: str = ""
    val_shards: CommaList = ""
    val_jsonl: CommaList = ""
    shard_cache: str = ""
    shard_cache_gb: float = 200.0
    tasks: CommaList = ""
    sqa_question: Literal["written", "spoken"] = "written"
    per_device_bsz: int = 4
    max_tokens_per_micro_batch: int = 0
    max_len: int = 2048
    load_in_4bit: bool = False
    bf16: bool | None = None
    tf32: bool = False
    num_workers: int = 2
    private_text: bool = False
    seed: int = 0

    def validate(self) -> None:
        """Check what does not need the data. Raises :class:`UserError` with one line."""
        for name in ("per_device_bsz", "max_len", "num_workers"):
            _at_least(self, name, 1)
        for name in ("shard_cache_gb", "max_tokens_per_micro_batch"):
            _at_least(self, name, 0)
        if split_list(self.val_shards) and split_list(self.val_jsonl):
            raise UserError(
                "both --val_shards and --val_jsonl are given; the dev data would be ambiguous, give one"
            )

    def one_of(self, first: str, second: str) -> None:
        """Raise :class:`UserError` unless exactly one of two data flags is given."""
        given = [name for name in (first, second) if split_list(getattr(self, name))]
        if len(given) != 1:
            state = "both are given" if given else "neither is given"
            raise UserError(f"--{first} and --{second}: {state}; give exactly one of them")


@dataclasses.dataclass
class TrainConfig(DataConfig):
    """Settings of launch/train.py.

    Attributes:
        train_shards: packed training sets, comma separated folders (each holds a manifest.json) or https and s3 URLs
        train_jsonl: training sets as JSONL, comma separated; packed into the output directory first
        encoder_cache: a local folder for the frozen encoder's states of the training audio, which every epoch after the
            first reads instead of computing them (3.8 MB per 30 s in bfloat16); empty: none
        encoder_cache_gb: most GB that its files may take together
        train_where: pack only the rows of train_jsonl that match: 'domain!=call' or 'language=ko; domain=call,clinic',
            of the fields language, domain, speaker, document and task; empty: all
        grad_accum: micro-batches of per_device_bsz examples per rank and step, at the first start
        global_batch_size: examples per optimizer step over all ranks; 0: per_device_bsz x grad_accum x ranks
        epochs: one epoch is as many draws as there are training examples in all tasks together
        max_steps: optimizer steps; 0: as --epochs says
        max_overlong_rate: share of training examples above --max_len that may be left out
        packed: put several examples into one row, without padding; false: one per row, per_device_bsz rows at most;
            the loss and the gradient are the same
        task_weights: share of examples per task, '1.0,1.5,1.2' in the order asr,sqa,tqa or 'asr=1,tqa=2';
            empty: in proportion to the number of examples
        stages: the curriculum, a YAML file or 'NAME:SHARE:WEIGHTS; ...', for example
            'text:0.2:tqa=1; all:0.8:1,1.5,1.2'; instead of task_weights
        lr_schedule: one learning-rate curve over the run, or one per stage
        rewarmup_steps: steps over which the rate comes back from 0 after the weights changed
        task_batch_sizes: at most k examples of a task in a micro-batch, 'asr=4,sqa=2,tqa=8'
        loss_norm: what weighs equally in the loss: every target token, every example or every task of the step
        label_smoothing: share of the target probability spread evenly over the vocabulary, in [0, 1)
        learning_rate: peak learning rate
        warmup_ratio: share of all steps in which the rate rises linearly, before it falls along a cosine to 0
        weight_decay: AdamW weight decay on the trained parameters
        max_grad_norm: clip the global gradient norm at this value; 0: no clipping
        grad_ckpt: recompute the language model's layers in the backward pass (less memory, more time)
        torch_compile: compile the layers for training (the first steps take minutes); the gradient is the same up to
            rounding, the dropout masks are others; not with --grad_ckpt
        freeze_whisper: keep the audio encoder frozen; false trains all of it
        tune: what trains: 'lora': an adapter; 'projector': the projector's own weights; 'language_model': those of the
            language model's layers too, in float32
        init_adapter: begin from the weights of a run, checkpoint or adapter folder (as --lora_dir) of the same form
        lora_r: rank of the adapter
        lora_alpha: scale of the adapter, the update is multiplied by alpha / r
        lora_dropout: dropout on the adapter's input
        lora_targets: where adapters sit: the language model's linears, the projector's, or both
        lora_rslora: scale the update by alpha / sqrt(r) instead of alpha / r (rsLoRA)
        lora_dora: train the length of each weight's rows apart from their direction (DoRA)
        eval_steps: decode the dev sets every so many steps, besides before and after training; 0: only those two
        val_loss_steps: measure the loss of 64 dev examples per task every so many steps; 0: never
        grad_conflict_steps: compare the gradients of the tasks on 16 dev examples each every so many steps; 0: never
        best_metric: what names the best checkpoint: macro, weighted or TASK.SCORE such as asr.cer
        early_stopping_patience: stop after so many evaluations without a gain, in the last stage; 0: never
        early_stopping_min_delta: gain of the best score that counts
        eval_max_new_tokens: most tokens a decoded answer may have; 0: a transcript by the length of its audio, else 256
        save_steps: write a checkpoint every so many steps, besides at evaluations and the end; 0: only those
        save_total_limit: checkpoints kept besides the best one
        max_failed_saves: give up after so many checkpoints in a row that could not be written; 0: after the first
        spike_factor: go back to the last checkpoint and past the steps since then when the loss exceeds so many times
            the median of the last 50; 0: never
        max_skipped_steps: give up after so many steps in a row with a non-finite loss or gradient
        stall_timeout: seconds a rank may stand still before it is named and the run ends; 0: for ever
        resume: 'auto': go on from the newest checkpoint of the output directory; 'none': it must hold no run; or
            RUN/checkpoints/step-00000100: from this one, of the run itself (later ones are set aside) or another
        allow_change: what may differ from the run that goes on: weights, global_batch, data (added behind the old)
        ds_config: DeepSpeed JSON to use instead of the built-in ZeRO-2 settings (see ds_configs/)
        dry_run: print the plan, ten decoded prompts with their label masks, balance and memory, and stop
        debug: train up to 3 steps on a few examples, print batches, gradients and memory, write nothing, and stop
    """

    train_shards: CommaList = ""
    train_jsonl: CommaList = ""
    encoder_cache: str = ""
    encoder_cache_gb: float = 200.0
    train_where: str = ""
    grad_accum: int = 1
    global_batch_size: int = 0
    epochs: float = 1.0
    max_steps: int = 0
    max_overlong_rate: float = 0.01
    packed: bool = True
    task_weights: str = ""
    stages: str = ""
    lr_schedule: Literal["run", "stage"] = "run"
    rewarmup_steps: int = 20
    task_batch_sizes: str = ""
    loss_norm: Literal["tokens", "examples", "tasks"] = "tokens"
    label_smoothing: float = 0.0
    learning_rate: float = 1e-4
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    grad_ckpt: bool = False
    torch_compile: bool = False
    freeze_whisper: bool = True
    tune: Literal["lora", "projector", "language_model"] = "lora"
    init_adapter: str = ""
    lora_r: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.05
    lora_targets: Literal["language_model", "projector", "both"] = "both"
    lora_rslora: bool = False
    lora_dora: bool = False
    eval_steps: int = 0
    val_loss_steps: int = 0
    grad_conflict_steps: int = 0
    best_metric: str = "macro"
    early_stopping_patience: int = 0
    early_stopping_min_delta: float = 0.0
    eval_max_new_tokens: int = 0
    save_steps: int = 500
    save_total_limit: int = 3
    max_failed_saves: int = 3
    spike_factor: float = 0.0
    max_skipped_steps: int = 20
    stall_timeout: float = 600.0
    resume: str = "auto"
    allow_change: CommaList = ""
    ds_config: str = ""
    dry_run: bool = False
    debug: bool = False

    def validate(self) -> None:
        super().validate()
        self._check_tune()
        self._check_length()
        self._check_data()
        for name in ("model_id", "output_dir"):
            _required(self, name)
        self.one_of("train_shards", "train_jsonl")
        for name, least in (
            ("grad_accum", 1),
            ("lora_r", 1),
            ("save_total_limit", 1),
        ):
            _at_least(self, name, least)
        for name in (
            "global_batch_size",
            "max_steps",
            "eval_steps",
            "eval_max_new_tokens",
            "val_loss_steps",
            "grad_conflict_steps",
            "early_stopping_patience",
            "early_stopping_min_delta",
            "save_steps",
            "max_failed_saves",
            "rewarmup_steps",
        ):
            _at_least(self, name, 0)
        for name in ("learning_rate", "weight_decay", "max_grad_norm", "lora_alpha", "stall_timeout"):
            _at_least(self, name, 0.0)
        for name in ("label_smoothing", "warmup_ratio", "lora_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UserError(f"--{name} {getattr(self, name)} is not in [0, 1)")
        if self.spike_factor and not 1.0 < self.spike_factor < math.inf:
            raise UserError(f"--spike_factor {self.spike_factor} must be above 1, or 0 for no guard")
        if self.early_stopping_patience and not self.eval_steps:
            raise UserError(
                f"--early_stopping_patience {self.early_stopping_patience} counts evaluations; give --eval_steps too"
            )
        if self.stages and self.task_weights:
            raise UserError(
                "--stages and --task_weights are both given; the stages hold the weights, give one"
            )
        if not 0.0 <= self.max_overlong_rate <= 1.0:
            raise UserError(f"--max_overlong_rate {self.max_overlong_rate} is not in [0, 1]")

    def _check_length(self) -> None:
        if not math.isfinite(self.epochs):
            raise UserError(
                f"--epochs {self.epochs} is no number of passes; give a positive one or --max_steps alone"
            )
        if self.max_steps == 0 and self.epochs <= 0:
            raise UserError(
                f"--epochs {self.epochs} leaves nothing to train; give a positive number or --max_steps"
            )

    def _check_data(self) -> None:
        _at_least(self, "encoder_cache_gb", 0)
        if self.encoder_cache and not self.freeze_whisper:
            raise UserError(
                f"--encoder_cache {self.encoder_cache} with --no_freeze_whisper: an encoder that trains gives other "
                "states in every step; leave one out"
            )
        if self.train_where and not split_list(self.train_jsonl):
            raise UserError(
                f"--train_where {self.train_where!r}: packed sets hold what they hold; filter when packing, with "
                "tools/build_shards.py --where, or give --train_jsonl"
            )
        if self.grad_conflict_steps and not (split_list(self.val_shards) or split_list(self.val_jsonl)):
            raise UserError(
                f"--grad_conflict_steps {self.grad_conflict_steps} compares the tasks on dev examples; give "
                "--val_shards or --val_jsonl too"
            )

    def _check_tune(self) -> None:
        for name in ("lora_rslora", "lora_dora"):
            if getattr(self, name) and self.tune != "lora":
                raise UserError(f"--{name} with --tune {self.tune}: there is no adapter; give --tune lora")
        if self.load_in_4bit and self.tune == "language_model":
            raise UserError(
                "--load_in_4bit with --tune language_model: weights in 4 bits cannot train; leave one out"
            )
        if self.torch_compile and self.grad_ckpt:
            raise UserError(
                "--torch_compile with --grad_ckpt: PyTorch cannot compile layers that are recomputed; leave one out"
            )
        if self.dry_run and self.debug:
            raise UserError(
                "--dry_run and --debug are both given; one trains nothing, the other does; give one"
            )


@dataclasses.dataclass
class EvalConfig(DataConfig):
    """Settings of launch/evaluate.py.

    Attributes:
        lora_dir: a run directory (its best checkpoint, else the latest), a checkpoint or an adapter folder;
            empty: the base model
        gen_max_new_tokens: most tokens a decoded answer may have; 0: a transcript by the length of its audio, else 256
        audio_probe: decode twice more, with the audio swapped between rows and with silence, and report how far the
            scores fall
        predict: decode without scoring, comma separated: JSONL files whose rows need no target, audio files, folders
        task: of audio files in --predict
        language: of audio files in --predict, two letters; empty: the model finds out
        question: of audio files in --predict, for tasks that ask
    """

    lora_dir: str = ""
    gen_max_new_tokens: int = 0
    audio_probe: bool = False
    predict: CommaList = ""
    task: str = ""
    language: str = ""
    question: str = ""

    def validate(self) -> None:
        super().validate()
        _at_least(self, "gen_max_new_tokens", 0)
        if not split_list(self.predict):
            self.one_of("val_shards", "val_jsonl")
            for name in ("task", "language", "question"):
                if getattr(self, name):
                    raise UserError(
                        f"--{name} is of files in --predict, which is not given; leave it out or give both"
                    )
        elif split_list(self.val_shards) or split_list(self.val_jsonl) or self.audio_probe:
            raise UserError("--predict scores nothing; leave out --val_shards, --val_jsonl and --audio_probe")


def _required(config: DataConfig, name: str) -> None:
    if not getattr(config, name):
        raise UserError(f"--{name} is missing; there is no default for it")


def _at_least(config: DataConfig, name: str, least: float) -> None:
    value = getattr(config, name)
    if not (math.isfinite(value) and value >= least):
        raise UserError(f"--{name} {value} is not a number of at least {least}")


def split_list(value: CommaList) -> list[str]:
    """Items of a comma separated flag or a YAML list, without blanks."""
    items = value.split(",") if isinstance(value, str) else value
    return [item.strip() for item in items if item.strip()]


def to_dict(config: DataConfig) -> dict[str, Any]:
    """Plain values, as config.yaml holds them."""
    return dataclasses.asdict(config)


def dump_yaml(config: DataConfig) -> str:
    """The text of config.yaml; ``--config`` reads it back."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises :class:`UserError` when it is none."""
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no settings; expected lines of 'name: value'")
    return values
