"""Everything that a run is made from: typed, checked, and written to the run's folder as JSON."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes, arg

from dst.convert import INITS
from dst.data import AUGMENTATIONS, DATASETS
from dst.data.drawn import HARDEST
from dst.distributions import DISTRIBUTIONS
from dst.drop import CRITERIA
from dst.growing import check_blocks, fields_of, growth_strategy, strategy_name
from dst.methods import METHODS, PIPELINES, entry_of
from dst.methods.base import GROWN_INITS
from dst.models import check_name, describe
from dst.presets import PRESETS
from dst.pruning import SCOPES, SCORES
from dst.ramp import RAMPS
from dst.redistribute import REDISTRIBUTIONS
from dst.schedules import BETA_DECAYS, DECAYS, LR_SCHEDULES
from growth import METRICS, STRATEGIES, InputError
from growth.block_search import WAYS
from growth.faiss_search import KINDS as FAISS_KINDS
from growth.gse import SAMPLINGS
from growth.nmslib_search import KINDS as NMSLIB_KINDS
from growth.scan import SCREENS
from triton_kernels import COMPUTE
from triton_kernels.mam import ABSENT

OPTIMIZERS = ("sgd", "adam", "adamw")
AMP = ("off", "bf16", "fp16")
WANDB = ("auto", "off", "offline", "online")
NEURONS = ("mam", "mac")


def _names(choices: Iterable[str]) -> str:
    return ", ".join(choices)


# The help of an option whose default is None says what happens then.
def _open(default: str, metavar: str) -> Any:
    return arg(help_behavior_hint=f"(default: {default})", metavar=metavar)


def _own(field_name: str) -> str:
    """``set 1ep, rigl 100, ...``: what the methods choose where the user does not."""
    entries = {name: entry.defaults for name, entry in METHODS.items() if entry.defaults}
    return ", ".join(f"{name} {getattr(own, field_name)}" for name, own in entries.items())


def _growth_option(help: str, field_name: str, metavar: str) -> Any:
    """Its default is the strategies', which may differ."""
    names: dict[Any, list[str]] = {}
    for name in STRATEGIES:
        if field_name in (own := fields_of(name)):
            names.setdefault(own[field_name], []).append(name)
    parts = (f"{value} in {_names(of)}" for value, of in names.items())
    return arg(help=help, help_behavior_hint=f"(default: {'; '.join(parts)})", metavar=metavar)


_PRESETS = "; ".join(f"{name} ({preset.summary})" for name, preset in PRESETS.items())
_METHODS = "; ".join(
    [f"{name} ({entry.summary})" for name, entry in METHODS.items()]
    + [f"{name} ({summary})" for name, summary in PIPELINES.items()]
)


@dataclass(frozen=True)
class SparsityConfig:
    """Which weights are alive at the start."""

    density: float = 0.1
    """Share of weights alive, in (0, 1)."""
    density_start: Annotated[float | None, _open("--density", "FLOAT")] = None
    """Density at the start, in (0, 1], of a ramp that updates lead down or up to --density."""
    density_ramp: Annotated[str, arg(help=f"Course of that ramp: {_names(RAMPS)}.")] = "cubic"
    density_ramp_end: Annotated[float | None, _open("the last update", "FLOAT")] = None
    """Share of the run after which --density is reached, in (0, 1]."""
    distribution: Annotated[str, arg(help=f"Density per layer: {_names(DISTRIBUTIONS)}.")] = "erk"
    block: Annotated[str, arg(metavar="N|HxW")] = "1"
    """Block of weights that live and die together: outputs x inputs (channels at one tap)."""
    skip: str = "auto"
    """Layers kept dense: names, patterns, first, last; none; auto (first if uniform)."""
    init: Annotated[str, arg(help=f"Initial weights: {_names(INITS)}.")] = "sparse-aware"
    compute: Annotated[str, arg(help=f"Sparse products: {_names(COMPUTE)}.")] = "auto"


@dataclass(frozen=True)
class GrowthConfig:
    """How new connections are found."""

    strategy: Annotated[
        str | None,
        arg(
            name="growth",
            prefix_name=False,
            help=f"Growth strategy: {_names(STRATEGIES)}.",
            help_behavior_hint="(default: the method's own)",
            metavar="STR",
        ),
    ] = None
    audit: Annotated[
        int,
        arg(
            name="growth-audit",
            prefix_name=False,
            help="Compare the search with the exact one at every so many updates; 0: never. Not "
            "for random growth, which searches nothing.",
        ),
    ] = 0
    metric: Annotated[
        str | None,
        _growth_option(f"Similarity of vectors: {_names(METRICS)}.", "metric", "STR"),
    ] = None
    screen: Annotated[
        str | None,
        _growth_option(
            f"Precision in which products are looked at first: {_names(SCREENS)}.", "screen", "STR"
        ),
    ] = None
    way: Annotated[
        str | None,
        _growth_option(f"How blocks are scored: {_names(WAYS)}.", "way", "STR"),
    ] = None
    tile_floats: Annotated[
        int | None, _growth_option("Entries of the gradient held at a time.", "tile_floats", "INT")
    ] = None
    rank: Annotated[
        int | None, _growth_option("Rank that the gradient is reduced to.", "rank", "INT")
    ] = None
    recall: Annotated[
        float | None,
        _growth_option("Share of the best connections to find at least.", "recall", "FLOAT"),
    ] = None
    candidates: Annotated[
        float | None,
        _growth_option("Connections rescored for each that is grown.", "candidates", "FLOAT"),
    ] = None
    k_similar: Annotated[
        float | None,
        _growth_option(
            "Share of the activation vectors that each query of an index returns.",
            "k_similar",
            "FLOAT",
        ),
    ] = None
    index: Annotated[
        str | None,
        _growth_option(
            f"Index of faiss: {_names(FAISS_KINDS)}; of nmslib: {_names(NMSLIB_KINDS)}.",
            "index",
            "STR",
        ),
    ] = None
    bits: Annotated[
        float | None,
        _growth_option("Length of an LSH code, times the vectors' length.", "bits", "FLOAT"),
    ] = None
    nprobe: Annotated[
        float | None, _growth_option("Share of the lists of ivf visited.", "nprobe", "FLOAT")
    ] = None
    links: Annotated[
        int | None, _growth_option("Links of a vector in a graph of hnsw.", "links", "INT")
    ] = None
    ef_construction: Annotated[
        int | None,
        _growth_option("Candidates kept when a graph is built.", "ef_construction", "INT"),
    ] = None
    ef_search: Annotated[
        int | None, _growth_option("Candidates kept when a graph is searched.", "ef_search", "INT")
    ] = None
    sampling: Annotated[
        str | None,
        _growth_option(f"How likely a neuron is drawn: {_names(SAMPLINGS)}.", "sampling", "STR"),
    ] = None
    subset: Annotated[
        float | None,
        _growth_option("Connections drawn for each that is alive.", "subset", "FLOAT"),
    ] = None
    share: Annotated[
        float | None,
        _growth_option("Share of the inputs and outputs searched.", "share", "FLOAT"),
    ] = None
    momentum: Annotated[
        float | None,
        _growth_option("Decay of the gradients' sum that is searched.", "decay", "FLOAT"),
    ] = None


@dataclass(frozen=True)
class UpdateConfig:
    """When the topology changes, and how much."""

    update_interval: Annotated[str | None, _open(_own("interval"), "N|Nep")] = None
    """Steps between updates, or epochs as in 1ep or 0.5ep."""
    update_fraction: Annotated[float | None, _open(_own("fraction"), "FLOAT")] = None
    """Share of the alive connections replaced at the first update (alpha, zeta, K)."""
    update_decay: Annotated[
        str | None,
        arg(
            help=f"How that share falls: {_names(DECAYS)}.",
            help_behavior_hint=f"(default: {_own('decay')})",
            metavar="STR",
        ),
    ] = None
    update_end: Annotated[float | None, _open(_own("end"), "FLOAT")] = None
    """T_end: share of the run after which the topology stays, in (0, 1]."""
    update_average: int = 1
    """Steps whose vectors are searched together by one update."""
    update_average_rank: Annotated[int | None, _open("no average", "INT")] = None
    """Search a decayed average over all steps, kept in this rank."""
    update_average_decay: Annotated[
        float | None, _open("0.9 with --update-average-rank, else 1", "FLOAT")
    ] = None
    """What a step's gradient is multiplied with at every later step of an average."""
    update_skips_step: Annotated[bool | None, _open("True in rigl", "{True,False}")] = None
    """Whether an update takes the place of the optimizer's step (RigL's algorithm 1)."""
    drop: Annotated[
        str | None,
        arg(
            help=f"Which connections to drop: {_names(CRITERIA)}.",
            help_behavior_hint="(default: magnitude; signed-magnitude in set)",
            metavar="STR",
        ),
    ] = None
    redistribute: Annotated[
        str | None,
        arg(
            help=f"Move connections to layers of a large mean: {_names(REDISTRIBUTIONS)}.",
            help_behavior_hint="(default: none; momentum in snfs)",
            metavar="STR",
        ),
    ] = None
    regrow: bool = True
    """Whether a connection dropped in an update may be grown in the same one."""
    keep_regrown: bool = True
    """Whether such a one keeps its value and optimizer state."""
    grown_init: Annotated[
        str, arg(help=f"Weight of a grown connection: {_names(GROWN_INITS)}.")
    ] = "zero"


@dataclass(frozen=True)
class MamConfig:
    """--method mam: train with multiply-and-max/min, prune, fine-tune."""

    mam_layers: str = "auto"
    """Layers to prune: names, patterns, first, last; auto: mlp layers of a transformer, else all
    linear ones but the last."""
    neuron: Annotated[
        str, arg(help="What they compute before pruning: mam; or mac, an ordinary sum.")
    ] = "mam"
    vanish_epochs: Annotated[float | None, _open("half of --epochs", "FLOAT")] = None
    """Epochs over which the ordinary sum vanishes (Q)."""
    beta_decay: Annotated[str, arg(help=f"Its course: {_names(BETA_DECAYS)}.")] = "linear"
    beta_interval: Annotated[str, arg(metavar="N|Nep")] = "1"
    """Steps after which its share beta changes, or epochs as in 1ep."""
    prune_after: Annotated[float | None, _open("at the end of --epochs", "FLOAT")] = None
    """Prune early: so many epochs after the sum has vanished."""
    keep: float = 0.01
    """Share of these layers' weights that pruning keeps, in (0, 1)."""
    prune_score: Annotated[str, arg(help=f"What is kept: {_names(SCORES)}.")] = "gradient"
    prune_scope: Annotated[str, arg(help=f"Compared within: {_names(SCOPES)}.")] = "global"
    prune_on: Annotated[str, arg(help="Images that scores are measured on: val, train.")] = "val"
    prune_images: Annotated[int | None, _open("all of them", "INT")] = None
    """How many of these images."""
    prune_curve: bool = False
    """Also measure, before pruning, the accuracy at many shares kept, by every score."""
    after_prune: Annotated[
        str, arg(help="What pruned layers compute: mac, the sum again; or mam.")
    ] = "mac"
    absent: Annotated[
        str, arg(help=f"What a pruned weight does in a mam layer: {_names(ABSENT)} (competes).")
    ] = "zero"
    finetune_epochs: Annotated[
        int | None, _open("what early pruning left of --epochs, else 3/7 of them", "INT")
    ] = None
    """Epochs after pruning."""
    finetune_lr: Annotated[float | None, _open("--lr", "FLOAT")] = None
    """Learning rate of these at its highest."""


@dataclass(frozen=True)
class DataConfig:
    """What it is trained on."""

    data: Annotated[str, arg(help=f"Data set: {_names(DATASETS)}.")] = "mnist-5k"
    data_dir: str = "data"
    """Folder of data sets that no package ships."""
    download: bool = False
    """Fetch the data set into that folder if it is missing."""
    data_difficulty: float = 1.0
    """How hard the images of strokes are: 0 (clean shapes) to 3."""
    image_size: Annotated[int | None, _open("the data's own; 224 of folders", "INT")] = None
    """Height and width that images are resized to."""
    val_size: Annotated[int | None, _open("the data set's", "INT")] = None
    """Training images held out for validation; 0: none."""
    split_seed: int = 0
    """Seed of the split, apart from the run's seed."""
    augment: Annotated[
        str, arg(help=f"Augmentation: {_names(AUGMENTATIONS)}; auto: the usual.")
    ] = "auto"
    batch: int = 64
    """Images per step, over all workers of a torchrun together."""
    workers: int = 0
    """Processes that prepare batches; 0: in the main one."""


@dataclass(frozen=True)
class OptimConfig:
    """How the weights are trained."""

    epochs: int = 10
    """Passes over the training images."""
    optimizer: Annotated[str, arg(help=f"Optimizer: {_names(OPTIMIZERS)}.")] = "sgd"
    lr: float = 0.1
    """Learning rate at its highest."""
    lr_schedule: Annotated[str, arg(help=f"Its course: {_names(LR_SCHEDULES)}.")] = "cosine"
    lr_milestones: str = "0.5,0.75"
    """Shares of the run at which schedule steps lowers the rate."""
    lr_factor: float = 0.1
    """What it is multiplied with there."""
    warmup: int = 0
    """First steps over which the rate rises linearly."""
    momentum: float = 0.9
    """Momentum of sgd."""
    nesterov: bool = True
    """Nesterov momentum, in sgd."""
    weight_decay: float = 5e-4
    """L2 penalty (decoupled in adamw)."""
    label_smoothing: float = 0.0
    """Share of the target spread over all classes, in [0, 1)."""
    amp: Annotated[str, arg(help=f"Autocast to half precision: {_names(AMP)}.")] = "off"
    channels_last: bool = True
    """Keep images in NHWC order, which convolutions are faster in."""
    compile: bool = False
    """Run the model through torch.compile."""


@dataclass(frozen=True)
class RunConfig:
    """Where it runs, and what is kept."""

    name: Annotated[str | None, _open("method-model-data-seed and a number", "STR")] = None
    """Name of the run's folder."""
    out: str = "runs"
    """Folder of all runs."""
    seed: int = 0
    """Seed of weights, topology and batches."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    threads: Annotated[int | None, _open("PyTorch's own", "INT")] = None
    """CPU threads."""
    verbose: bool = False
    """Say how the products of each sparse layer are computed."""
    checkpoint_interval: str = "1ep"
    """Steps between checkpoints, or epochs as in 1ep."""
    wandb: Annotated[
        str, arg(help="Weights & Biases: off, offline, online; auto: on under a sweep agent.")
    ] = "auto"
    wandb_project: str = "sparsegrow"
    """Its project."""
    resume: Annotated[str | None, _open("a new run", "FOLDER")] = None
    """Continue the run in this folder; on a CPU bit for bit."""
    config: Annotated[str | None, _open("none", "FILE")] = None
    """Take every flag that is not given from this config.json."""


@dataclass(frozen=True)
class Config:
    """Train a sparse network. With no flags: a WideResNet at density 0.1 on 5,000 MNIST images."""

    preset: Annotated[
        str | None,
        arg(
            help=f"Start from a paper's settings; flags win over them: {_PRESETS}.",
            help_behavior_hint="(default: none)",
            metavar="STR",
        ),
    ] = None
    method: Annotated[str, arg(help=f"{_METHODS}.")] = "similarity"
    model: Annotated[str, arg(help=f"Network: {describe()}.")] = "wrn-16-1"
    dropout: float = 0.0
    """Probability of dropping an activation, where the network has dropout."""
    weights: Annotated[str | None, _open("none", "FILE")] = None
    """Start from the weights in this file: a state dict of torch.save or safetensors."""
    sparsity: Annotated[SparsityConfig, OmitArgPrefixes] = field(default_factory=SparsityConfig)
    growth: GrowthConfig = field(default_factory=GrowthConfig)
    update: Annotated[UpdateConfig, OmitArgPrefixes] = field(default_factory=UpdateConfig)
    mam: Annotated[MamConfig, OmitArgPrefixes] = field(default_factory=MamConfig)
    data: Annotated[DataConfig, OmitArgPrefixes] = field(default_factory=DataConfig)
    training: Annotated[OptimConfig, OmitArgPrefixes] = field(default_factory=OptimConfig)
    run: Annotated[RunConfig, OmitArgPrefixes] = field(default_factory=RunConfig)


def check(config: Config) -> None:
    """Refuse what cannot be, before anything is built. Raises InputError."""
    choose("method", config.method, [*METHODS, *PIPELINES])
    if config.preset is not None:
        choose("preset", config.preset, PRESETS)
    check_name(config.model)
    entry = entry_of(config.method)
    sparsity, growth, update = config.sparsity, config.growth, config.update
    choose("distribution", sparsity.distribution, DISTRIBUTIONS)
    choose("init", sparsity.init, INITS)
    choose("compute", sparsity.compute, COMPUTE)
    block = parse_block(sparsity.block)
    _number("density", sparsity.density, above=0, below=1)
    choose("density-ramp", sparsity.density_ramp, RAMPS)
    if sparsity.density_start is not None:
        _number("density-start", sparsity.density_start, above=0, most=1)
    if sparsity.density_ramp_end is not None:
        _number("density-ramp-end", sparsity.density_ramp_end, above=0, most=1)
    if growth.strategy is not None:
        choose("growth", growth.strategy, STRATEGIES)
    if growth.metric is not None:
        choose("growth.metric", growth.metric, METRICS)
    _number("growth-audit", growth.audit, least=0)
    if growth.strategy not in (None, *entry.growths):
        able = ", ".join(entry.growths) or "nothing"
        raise InputError(
            f"method {config.method} grows by {able}, not by {growth.strategy}: leave --growth "
            "away or use --method similarity"
        )
    name = strategy_name(config)
    if update.redistribute == "momentum" and name not in (None, "momentum"):
        raise InputError(
            "redistribute momentum needs the momentum that growth momentum keeps: use "
            "--method snfs or --method similarity --growth momentum"
        )
    metric = growth.metric or "abs-ip"
    if metric != "abs-ip" and config.method != "similarity" and entry.sparse:
        raise InputError(f"method {config.method} has no metric: use --method similarity")
    if update.update_average_rank is not None:
        _number("update-average-rank", update.update_average_rank, least=1)
    if update.update_average_decay is not None:
        _number("update-average-decay", update.update_average_decay, least=0, most=1)
    strategy = growth_strategy(config)
    if strategy is not None:
        check_blocks(strategy, block)
        if growth.audit and not strategy.needs_pairs:
            raise InputError(
                f"growth {name} searches nothing that could be compared: leave --growth-audit away"
            )
    if update.update_fraction is not None:
        _number("update-fraction", update.update_fraction, above=0, most=1)
    if update.update_end is not None:
        _number("update-end", update.update_end, above=0, most=1)
    for name, value, choices in (
        ("update-decay", update.update_decay, DECAYS),
        ("drop", update.drop, CRITERIA),
        ("redistribute", update.redistribute, REDISTRIBUTIONS),
    ):
        if value is not None:
            choose(name, value, choices)
    choose("grown-init", update.grown_init, GROWN_INITS)
    if update.update_interval is not None:
        parse_interval("update-interval", update.update_interval, 1)
    if config.method == "mam":
        _check_mam(config)
    _check_training(config)


def _check_mam(config: Config) -> None:
    mam, epochs = config.mam, config.training.epochs
    choose("neuron", mam.neuron, NEURONS)
    choose("after-prune", mam.after_prune, NEURONS)
    choose("beta-decay", mam.beta_decay, BETA_DECAYS)
    choose("prune-score", mam.prune_score, SCORES)
    choose("prune-scope", mam.prune_scope, SCOPES)
    choose("prune-on", mam.prune_on, ("val", "train"))
    choose("absent", mam.absent, ABSENT)
    parse_interval("beta-interval", mam.beta_interval, 1)
    _number("keep", mam.keep, above=0, below=1)
    if parse_block(config.sparsity.block) != (1, 1):
        raise InputError(
            f"method mam prunes single weights, not blocks of {config.sparsity.block}: leave "
            "--block away"
        )
    if mam.neuron == "mac" and mam.after_prune == "mam":
        raise InputError("max and min are not put into layers after pruning: use --neuron=mam")
    vanish = mam.vanish_epochs
    if vanish is not None:
        _number("vanish-epochs", vanish, least=0, most=epochs)
    if mam.prune_after is not None:
        _number("prune-after", mam.prune_after, least=0)
        spent = (epochs / 2 if vanish is None else vanish) + mam.prune_after
        if spent > epochs:
            raise InputError(
                f"prune-after {mam.prune_after:g} is {spent:g} epochs into a run of {epochs}: "
                "lower it or --vanish-epochs, or raise --epochs"
            )
    if mam.prune_images is not None:
        _number("prune-images", mam.prune_images, least=1)
    if mam.finetune_epochs is not None:
        _number("finetune-epochs", mam.finetune_epochs, least=0)
    if mam.finetune_lr is not None:
        _number("finetune-lr", mam.finetune_lr, above=0)


def _check_training(config: Config) -> None:
    data, training, run = config.data, config.training, config.run
    choose("data", data.data, DATASETS)
    _number("data-difficulty", data.data_difficulty, least=0, most=HARDEST)
    if data.image_size is not None:
        _number("image-size", data.image_size, least=1, most=4096)
    choose("augment", data.augment, ("auto", *AUGMENTATIONS))
    _number("epochs", training.epochs, least=1)
    _number("batch", data.batch, least=1)
    _number("workers", data.workers, least=0)
    choose("optimizer", training.optimizer, OPTIMIZERS)
    choose("lr-schedule", training.lr_schedule, LR_SCHEDULES)
    choose("amp", training.amp, AMP)
    choose("wandb", run.wandb, WANDB)
    _number("lr", training.lr, above=0)
    _number("lr-factor", training.lr_factor, above=0, most=1)
    for share in parse_shares(training.lr_milestones):
        _number("lr-milestones", share, least=0, most=1)
    _number("warmup", training.warmup, least=0)
    _number("momentum", training.momentum, least=0, below=1)
    _number("weight-decay", training.weight_decay, least=0)
    _number("label-smoothing", training.label_smoothing, least=0, below=1)
    _number("seed", run.seed, least=0, below=2**63)
    _number("split-seed", data.split_seed, least=0, below=2**63)
    if run.threads is not None:
        _number("threads", run.threads, least=1)
    if training.optimizer == "sgd" and training.nesterov and training.momentum == 0:
        raise InputError("nesterov needs a momentum above 0: add --no-nesterov")
    if run.resume is not None and run.config is not None:
        raise InputError("--resume takes the run's own config: leave --config away")
    parse_interval("checkpoint-interval", run.checkpoint_interval, 1)


def choose(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise InputError, with the nearest choice, unless ``value`` is one of ``choices``."""
    choices = list(choices)
    if value not in choices:
        near = difflib.get_close_matches(value, choices, n=1)
        hint = f"did you mean {near[0]}? Choose" if near else "choose"
        raise InputError(f"{name} {value!r} is unknown: {hint} {', '.join(choices)}")


def _number(
    name: str,
    value: float,
    *,
    above: float = -math.inf,
    least: float = -math.inf,
    below: float = math.inf,
    most: float = math.inf,
) -> None:
    if math.isfinite(value) and above < value < below and least <= value <= most:
        return
    low = f"above {above:g}" if above > -math.inf else f"at least {least:g}"
    limits = [low] if max(above, least) > -math.inf else []
    if min(below, most) < math.inf:
        limits.append(f"below {below:g}" if below < math.inf else f"at most {most:g}")
    raise InputError(f"{name} {value} must be {' and '.join(limits)}")


def parse_block(text: str) -> tuple[int, int]:
    """``"16"`` -> (16, 16), ``"8x32"`` -> (8, 32)."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise InputError(f"block {text!r} must be a size such as 16, or outputs x inputs: 8x32")
    return int(parts[0]), int(parts[-1])


def parse_interval(name: str, text: str, steps_per_epoch: int) -> int:
    """``"100"`` -> 100 steps; ``"0.5ep"`` -> that many epochs in steps, at least one."""
    number = text.removesuffix("ep")
    try:
        value = float(number) if number != text else int(number)
        if not 0 < value < 1e9:
            raise ValueError
    except ValueError:
        raise InputError(
            f"{name} {text!r} must be a number of steps such as 100, or of epochs such as 1ep"
        ) from None
    return max(1, round(value * steps_per_epoch)) if number != text else int(value)


def parse_shares(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise InputError(
            f"{text!r} must be numbers separated by commas, such as 0.5,0.75"
        ) from None


def parse_skip(text: str) -> tuple[str, ...] | None:
    """For ``sparsify``: None for ``auto``."""
    if text == "auto":
        return None
    return () if text == "none" else tuple(part.strip() for part in text.split(",") if part.strip())


def to_json(config: Config) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(path: str | Path) -> Config:
    """Read what :func:`to_json` wrote; options it lacks keep their defaults.

    Raises InputError when the file is missing, not JSON, or has an unknown or ill-typed option.
    """
    try:
        loaded = json.loads(Path(path).read_text())
    except OSError as error:
        raise InputError(f"cannot read the config {path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"the config {path} is not JSON: {error}") from None
    if isinstance(loaded, dict) and isinstance(growth := loaded.get("growth"), dict):
        loaded["growth"] = _opened(growth)
    return typing.cast(Config, _build(Config, loaded, str(path), ""))


def _opened(growth: dict[str, Any]) -> dict[str, Any]:
    """Before growth's options could be left open, a config held the default of each, whether the
    strategy had it or not."""
    closed = {"strategy": "auto", "metric": "abs-ip", "k_similar": 0.15, "momentum": 0.9}
    if set(growth) != set(closed):
        return growth
    return {name: value for name, value in growth.items() if value != closed[name]}


def _build(kind: Any, loaded: Any, path: str, prefix: str) -> Any:
    if not isinstance(loaded, dict):
        raise InputError(f"the config {path} must hold an object{f' in {prefix}' * bool(prefix)}")
    hints = typing.get_type_hints(kind)
    values = {}
    for name, value in loaded.items():
        if name not in hints:
            raise InputError(f"the config {path} has an unknown option {prefix}{name}")
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            values[name] = _build(hint, value, path, f"{prefix}{name}.")
            continue
        allowed = hint.__args__ if isinstance(hint, types.UnionType) else (hint,)
        if float in allowed and type(value) is int:
            value = float(value)
        if type(value) not in allowed:
            wanted = " or ".join(t.__name__ for t in allowed if t is not types.NoneType)
            raise InputError(
                f"the config {path} has {prefix}{name} = {value!r}, which must be {wanted}"
            )
        values[name] = value
    return kind(**values)
