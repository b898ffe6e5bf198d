"""MAM as a pruning tool: train with max and min, prune, put the sum back, fine-tune.

L. Nikiforos, "The Multiply-And-Max/min Neural Paradigm as a Pruning and Training Accelerator",
Politecnico di Torino 2024, chapters 5 and 6.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dst.config import Config, parse_interval
from dst.data import Dataset, Split, eval_batches, steps_per_epoch
from dst.distributed import same_buffers, same_keys
from dst.flops import ImageCost
from dst.mam import hidden_layers, to_mac, to_mam
from dst.methods import Unchanging
from dst.pruning import SCOPES, SCORES, Score, check, measure, pruned_layers
from dst.recipes.fit import Fit
from dst.recipes.session import Session
from dst.recipes.setup import learning_rate, load_data, new_model, new_optimizer, new_scaler
from dst.report import Summary
from dst.schedules import BetaSchedule, LearningRate
from dst.seeding import generator
from dst.swap import swap
from dst.updater import TopologyUpdater
from growth import InputError
from growth.sampling import sample_distinct


class Plan(NamedTuple):
    """Steps: of the training before pruning, over which the sum vanishes in it, and after it."""

    train: int
    vanish: int
    finetune: int


def plan(config: Config, steps: int) -> Plan:
    """steps: of an epoch."""
    own, epochs = config.mam, config.training.epochs
    vanish = round(steps * (epochs / 2 if own.vanish_epochs is None else own.vanish_epochs))
    train = steps * epochs
    if own.prune_after is not None:
        # Whole epochs, after which accuracies are measured.
        train = min(train, -(-(vanish + round(own.prune_after * steps)) // steps) * steps)
    left = epochs - train // steps
    finetune = own.finetune_epochs
    if finetune is None:
        finetune = left or max(1, round(3 / 7 * epochs))
    return Plan(train, vanish, steps * finetune)


def mam(session: Session) -> Summary:
    """``--method mam``."""
    config, device, own = session.config, session.device, session.config.mam
    data = load_data(config)
    steps = steps_per_epoch(data.train, config.data.batch)
    phases = plan(config, steps)
    rates = _rates(config, phases, steps)
    images = _pruning_images(config, data)
    torch.manual_seed(config.run.seed)
    model = new_model(config, data, device, weights=not session.resumes)
    layers = hidden_layers(model)
    if own.mam_layers != "auto":
        layers = [part.strip() for part in own.mam_layers.split(",") if part.strip()]
    beta = None
    if own.neuron == "mam":
        model = to_mam(model, layers=layers, beta=1.0)
        interval = parse_interval("beta-interval", own.beta_interval, steps)
        beta = BetaSchedule(phases.vanish, own.beta_decay, interval)
    # What cannot be pruned is refused before it is trained.
    check(model, layers=layers, score=own.prune_score, keep=own.keep, scope=own.prune_scope)
    resumed = session.restore()
    phase = "train" if resumed is None else resumed[1]["kept"].get("phase")
    if phase not in ("train", "finetune"):
        raise InputError("the checkpoint is not of method mam: resume the run that it belongs to")

    flops, scoring = 0, 0
    if phase == "train":
        fit = _fit(session, data, model, steps, 0, phases.train, phase, beta=beta)
        if resumed is not None:
            fit.load(*resumed)
            resumed = None  # as large as the model and its optimizer's state
        fit.run(rates[0])
        fit.log_phase("trained")
        if own.prune_curve:
            _curve(fit, layers, images)
        flops, scoring = fit.flops, len(images) * scoring_cost(own.prune_score, fit.image_cost)
        # Its optimizer and gradients are not needed any more, while scores need memory.
        fit.optimizer.zero_grad(set_to_none=True)
        del fit
    model = _pruned(session, data, model, layers, images, skeleton=phase == "finetune")
    if own.after_prune == "mac":
        model = to_mac(model)

    end = phases.train + phases.finetune
    lr = config.training.lr if own.finetune_lr is None else own.finetune_lr
    fit = _fit(session, data, model, steps, phases.train, end, "finetune", lr=lr)
    fit.flops, fit.search_flops = flops, scoring
    if resumed is not None:
        fit.load(*resumed)
        resumed = None
    else:
        fit.log_phase("pruned")
        # From here on, nothing before it is needed: neither the training nor the scores.
        fit.save()
    if phases.finetune:
        fit.run(rates[1])
        fit.log_phase("fine-tuned")
    return fit.finish()


def _rates(config: Config, phases: Plan, steps: int) -> tuple[LearningRate, LearningRate]:
    """Before pruning, the course of the whole training, of which an early pruning sees a part;
    after it, one of its own."""
    before = learning_rate(config, steps * config.training.epochs)
    if phases.finetune == 0:
        return before, before
    try:
        return before, learning_rate(config, phases.finetune)
    except InputError as error:
        raise InputError(f"fine-tuning: {error}; raise --finetune-epochs") from None


def _fit(
    session: Session,
    data: Dataset,
    model: nn.Module,
    steps: int,
    start: int,
    end: int,
    phase: str,
    **options: Any,
) -> Fit:
    config = session.config
    if config.training.channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimizer, scaler = new_optimizer(config, model), new_scaler(config, session.device)
    updater = TopologyUpdater(
        model, optimizer, Unchanging(), scaler=scaler if scaler.is_enabled() else None
    )
    kept = {"phase": phase}
    return Fit(
        session, data, model, optimizer, scaler, updater, steps, end, start=start, kept=kept,
        **options,
    )  # fmt: skip


def _pruned(
    session: Session,
    data: Dataset,
    model: nn.Module,
    layers: list[str],
    images: Split,
    skeleton: bool,
) -> nn.Module:
    """skeleton: the values and what is alive come from a checkpoint, so that any will do."""
    config, own = session.config, session.config.mam
    with session.clock("pruning"):
        # Statistics of batches were gathered by each worker for itself.
        same_buffers(model)
        scores = _measure(
            session, data, model, layers, images, "magnitude" if skeleton else own.prune_score
        )
        return swap(
            model,
            pruned_layers(
                scores,
                keep=own.keep,
                scope=own.prune_scope,
                absent=own.absent,
                compute=config.sparsity.compute,
                agree=same_keys,
            ),
        )


def _measure(
    session: Session, data: Dataset, model: nn.Module, layers: list[str], images: Split, score: str
) -> list[Score]:
    config = session.config

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        size = config.data.batch
        for pixels, labels in eval_batches(images, data, size, workers=config.data.workers):
            yield session.to_device(pixels), labels.to(session.device)

    with session.autocast():
        return measure(model, score=score, layers=layers, batches=batches, seed=config.run.seed)


def scoring_cost(score: str, image: ImageCost) -> int:
    """FLOPs of an image of the pruning set."""
    needs = SCORES[score].needs
    return {"nothing": 0, "inputs": image.forward, "gradients": sum(image)}[needs]


# Shares kept: from where nothing is lost to where nothing is left.
CURVE = (0.5, 0.3, 0.2, 0.1, 0.05, 0.03, 0.02, 0.01, 0.005, 0.003, 0.002, 0.001, 0.0005)


def _curve(fit: Fit, layers: list[str], images: Split) -> None:
    """Accuracy against the share that is kept, by every score, without any training after it."""
    session, model, absent = fit.session, fit.model, fit.session.config.mam.absent
    whole = fit.evaluate(fit.data.test)
    for score in SCORES:
        with session.clock("pruning"):
            same_buffers(model)
            measured = _measure(session, fit.data, model, layers, images, score)
        total = sum(own.weights.total for own in measured)
        for scope in SCOPES:
            session.log("curve", fit.step, score=score, scope=scope, keep=1.0, test=whole)
        for scope, keep in itertools.product(SCOPES, CURVE):
            if keep * total < len(measured):
                continue  # fewer than a weight a layer
            with session.clock("pruning"):
                replaced = pruned_layers(
                    measured, keep=keep, scope=scope, absent=absent, agree=same_keys
                )
                swap(model, replaced)
                test = fit.evaluate(fit.data.test)
                swap(model, {twin: layer for layer, twin in replaced.items()})
            session.log("curve", fit.step, score=score, scope=scope, keep=keep, test=test)
        session.console.print(f"pruned to {len(CURVE)} shares by {score}", highlight=False)


def _pruning_images(config: Config, data: Dataset) -> Split:
    """The split that scores are measured on, or as many of its images as are wanted."""
    own = config.mam
    images = {"val": data.val, "train": data.train}[own.prune_on]
    if len(images) == 0:
        raise InputError(
            f"{config.data.data} has no validation images to prune by: give --val-size, or "
            "--prune-on=train"
        )
    wanted = len(images) if own.prune_images is None else own.prune_images
    if wanted > len(images):
        raise InputError(
            f"prune-images {wanted} is more than the {len(images)} images of {own.prune_on}"
        )
    if wanted == len(images):
        return images
    # Drawn: in many data sets the classes stand one after another.
    random = generator(config.run.seed, "pruning images", 0)
    return images[sample_distinct(len(images), wanted, random)]
