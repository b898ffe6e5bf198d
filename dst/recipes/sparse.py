"""Sparse training from scratch: build, make sparse, train while the topology changes."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam, AdamW, Optimizer

from dst import checkpoint
from dst.computing import how_computed
from dst.config import Config, parse_block, parse_interval, parse_shares, parse_skip
from dst.convert import density_ramp, density_table, model_density, sparsify
from dst.data import Dataset, Split, eval_batches, load, steps_per_epoch, train_loader
from dst.distributed import ignore_topology, rank, world_size
from dst.drop import CRITERIA
from dst.errors import StoppedError
from dst.flops import forward_macs, layer_costs, training_cost
from dst.growing import growth_strategy
from dst.layers import Choice
from dst.methods import METHODS, DropGrow, Method
from dst.models import build
from dst.progress import ProgressBar
from dst.recipes.session import Session
from dst.report import Summary, announce, announce_choices, write
from dst.schedules import LearningRate, UpdateSchedule
from dst.updater import TopologyUpdater
from growth import InputError, Momentum

_log = logging.getLogger(__name__)

# Steps between two looks at the loss: each waits for the device.
LOOK_EVERY = 10
EVAL_BATCH = 500


def sparse(session: Session) -> Summary:
    """``--method dense``, ``static`` and every drop/grow method."""
    config, device = session.config, session.device
    data = load(
        config.data.data,
        data_dir=config.data.data_dir,
        download=config.data.download,
        difficulty=config.data.data_difficulty,
        split_seed=config.data.split_seed,
        val_size=config.data.val_size,
        image_size=config.data.image_size,
    )
    steps = steps_per_epoch(data.train, config.data.batch)
    total = steps * config.training.epochs
    rate = _learning_rate(config, total)
    method = build_method(config, steps)
    torch.manual_seed(config.run.seed)
    model = _model(config, data, device, ramps=isinstance(method, DropGrow))
    method = _with_ramp(config, method, model, total)
    if config.training.channels_last:
        model = model.to(memory_format=torch.channels_last)
    example = torch.zeros(1, data.in_channels, data.image_size, data.image_size, device=device)
    optimizer = _optimizer(config, model)
    scaler = torch.amp.GradScaler(device.type, enabled=config.training.amp == "fp16")
    updater = TopologyUpdater(
        model,
        optimizer,
        method,
        scaler=scaler if scaler.is_enabled() else None,
        audit=config.growth.audit,
    )
    run = _Run(session, data, model, optimizer, scaler, updater, example, steps, total)
    resumed = session.restore()
    if resumed is not None:
        run.load(*resumed)
    run.fit(rate)
    return run.finish()


def build_method(config: Config, steps: int) -> Method:
    """The method of a config; what the user left open is the method's own. steps: per epoch."""
    entry, update = METHODS[config.method], config.update
    if entry.defaults is None:
        return entry.build(UpdateSchedule(1, 1, 1.0), config.run.seed)
    own = entry.defaults
    interval = parse_interval("update-interval", update.update_interval or own.interval, steps)
    total = steps * config.training.epochs
    end = own.end if update.update_end is None else update.update_end
    schedule = UpdateSchedule(
        interval,
        max(1, round(end * total)),
        own.fraction if update.update_fraction is None else update.update_fraction,
        update.update_decay or own.decay,
        update.update_average,
        # In low rank, the strategy decays by itself.
        1.0 if update.update_average_decay is None else update.update_average_decay,
    )
    if interval >= schedule.end:
        _log.warning(
            "the topology will never be updated: every %d steps, before step %d; lower "
            "--update-interval",
            interval,
            schedule.end,
        )
    method = entry.build(schedule, config.run.seed)
    assert isinstance(method, DropGrow)
    chosen: dict[str, Any] = {
        "regrow": update.regrow,
        "keep_regrown": update.keep_regrown,
        "grown_init": update.grown_init,
        "growth": growth_strategy(config),
    }
    if update.redistribute is not None:
        chosen["redistribute"] = update.redistribute
    if update.drop is not None:
        chosen["drop"] = CRITERIA[update.drop]
    if update.update_skips_step is not None:
        chosen["skips_step"] = update.update_skips_step
    if chosen.get("skips_step", method.skips_step) and interval == 1:
        raise InputError(
            "an update at every step that replaces the optimizer's step trains nothing: raise "
            "--update-interval or add --no-update-skips-step"
        )
    return dataclasses.replace(method, **chosen)


def _with_ramp(config: Config, method: Method, model: nn.Module, total: int) -> Method:
    """The method with the density ramp of a config, if there is one. total: steps of the run."""
    sparsity = config.sparsity
    if sparsity.density_start is None or not isinstance(method, DropGrow):
        return method
    last = method.schedule.last_update
    if last < 1:
        raise InputError(
            f"density-start {sparsity.density_start} needs updates to reach density "
            f"{sparsity.density}, and there are none: lower --update-interval"
        )
    end = last
    if sparsity.density_ramp_end is not None:
        end = min(last, max(1, round(sparsity.density_ramp_end * total)))
    ramp = density_ramp(
        model,
        to=sparsity.density,
        end=end,
        distribution=sparsity.distribution,
        shape=sparsity.density_ramp,
    )
    return dataclasses.replace(method, ramp=ramp)


def _model(config: Config, data: Dataset, device: torch.device, ramps: bool) -> nn.Module:
    """Built on the CPU, so that its weights are the same for every device; made sparse on the
    device, for which the products' way of computing is chosen. ramps: whether the method can lead
    one density to another."""
    model = build(
        config.model,
        in_channels=data.in_channels,
        image_size=data.image_size,
        classes=data.classes,
        dropout=config.dropout,
    ).to(device)
    if not METHODS[config.method].sparse:
        return model
    sparsity = config.sparsity
    start = sparsity.density_start if ramps else None
    return sparsify(
        model,
        density=sparsity.density if start is None else start,
        ramp_to=None if start is None else sparsity.density,
        distribution=sparsity.distribution,
        block=parse_block(sparsity.block),
        skip=parse_skip(sparsity.skip),
        init=sparsity.init,
        compute=sparsity.compute,
        seed=config.run.seed,
    )


def _optimizer(config: Config, model: nn.Module) -> Optimizer:
    training = config.training
    lr, decay = training.lr, training.weight_decay
    if training.optimizer == "sgd":
        return SGD(
            model.parameters(),
            lr,
            momentum=training.momentum,
            nesterov=training.nesterov,
            weight_decay=decay,
        )
    kind = {"adam": Adam, "adamw": AdamW}[training.optimizer]
    return kind(model.parameters(), lr, weight_decay=decay)


def _learning_rate(config: Config, total: int) -> LearningRate:
    training = config.training
    return LearningRate(
        total,
        training.lr_schedule,
        training.warmup,
        parse_shares(training.lr_milestones),
        training.lr_factor,
    )


class _Run:
    """A model in training, and how far it is."""

    def __init__(
        self,
        session: Session,
        data: Dataset,
        model: nn.Module,
        optimizer: Optimizer,
        scaler: torch.amp.GradScaler,
        updater: TopologyUpdater,
        example: Tensor,
        steps_per_epoch: int,
        total_steps: int,
    ) -> None:
        self.session, self.data, self.model = session, data, model
        self.optimizer, self.scaler, self.updater = optimizer, scaler, updater
        self.steps_per_epoch, self.total_steps = steps_per_epoch, total_steps
        self.step = 0
        try:
            self.costs = layer_costs(model, example)
        except AttributeError as error:
            if not updater.layers:
                raise
            raise InputError(
                f"model {session.config.model} does not run with sparse layers ({error}): keep "
                "those dense whose weight it reads itself, as in --skip='*.qkv'"
            ) from None
        self.forward_macs, self.density = 0, 0.0
        self._count_weights()
        # Multiply-accumulates of one forward pass over all images so far, and over those of steps
        # that an update replaced.
        self.macs = self.replaced_macs = self.search_flops = 0
        # Sums over the epoch so far: loss, correct predictions, images.
        self.sums = torch.zeros(3, dtype=torch.float64, device=session.device)
        config = session.config
        self.checkpoint_interval = parse_interval(
            "checkpoint-interval", config.run.checkpoint_interval, steps_per_epoch
        )
        self.checkpoint_due = self.told = False
        self.saved_step = 0
        augment = config.data.augment
        self.augment = data.augment if augment == "auto" else augment
        # Until then a compiled forward would be compiled anew for every number of weights.
        self.settled = 0
        method = updater.method
        self.takes_gradients = isinstance(method, DropGrow) and isinstance(method.growth, Momentum)
        if isinstance(method, DropGrow) and (method.ramp or method.redistribute != "none"):
            self.settled = method.schedule.last_update
        self._wrap()

    def _wrap(self) -> None:
        """Put the model into what runs it; again whenever its values were reallocated, because
        DistributedDataParallel keeps gradients in buckets of the old sizes."""
        # Lets go of what was around it before.
        self.network: nn.Module = self.model
        self.compiled: nn.Module = self.model
        if world_size() > 1:
            device = self.session.device
            ids = [device] if device.type == "cuda" else None
            ignore_topology(self.model)
            self.network = DistributedDataParallel(self.model, device_ids=ids)
        # A compiled forward does not see the recorder: steps that are recorded run eagerly.
        compiled = self.session.config.training.compile
        self.compiled = cast(nn.Module, torch.compile(self.network)) if compiled else self.network

    def _count_weights(self) -> None:
        table = density_table(self.model)
        self.density = model_density(self.model)
        alive = {row.name: row.alive / row.total for row in table}
        self.forward_macs = forward_macs(self.costs, alive)

    def fit(self, rate: LearningRate) -> None:
        """Train to the end of the last epoch."""
        session = self.session
        session.clock.add("start-up", time.perf_counter() - session.started)
        with ProgressBar(session.console, self.total_steps, self.step) as bar:
            while self.step < self.total_steps:
                epoch = self.step // self.steps_per_epoch
                self._train_epoch(epoch, rate, bar)
                self._log_epoch(epoch)
                self.sums.zero_()
                self._save_if_due()
        # The end is always kept, whatever the interval.
        if self.saved_step != self.step:
            self._save()

    def _train_epoch(self, epoch: int, rate: LearningRate, bar: ProgressBar) -> None:
        config, clock = self.session.config, self.session.clock
        loader = iter(
            train_loader(
                self.data.train,
                self.data,
                batch=config.data.batch,
                epoch=epoch,
                start=self.step % self.steps_per_epoch,
                seed=config.run.seed,
                augment=self.augment,
                workers=config.data.workers,
                rank=rank(),
                world=world_size(),
                pin=self.session.device.type == "cuda",
            )
        )
        self.network.train()
        label = f"epoch {epoch + 1}/{config.training.epochs}"
        for _ in range(self.step % self.steps_per_epoch, self.steps_per_epoch):
            # A checkpoint inside an epoch is due before the step after it, so that the end of an
            # epoch is saved with its metrics.
            self._save_if_due()
            with clock("data"):
                images, labels = next(loader)
                images = self._to_device(images)
                labels = labels.to(self.session.device, non_blocking=True)
            for group in self.optimizer.param_groups:
                group["lr"] = config.training.lr * rate.at(self.step)
            self._train_step(images, labels)
            if config.run.verbose and not self.told:
                self.told = True
                for line in how_computed(self.updater.layers):
                    self.session.console.print(line, highlight=False, soft_wrap=True)
            self.step += 1
            self.checkpoint_due |= self.step % self.checkpoint_interval == 0
            bar.advance(config.data.batch)
            if self.step % LOOK_EVERY == 0:
                loss, accuracy = self._look()
                bar.show(label, loss, accuracy, self.density)

    def _train_step(self, images: Tensor, labels: Tensor) -> None:
        training, clock = self.session.config.training, self.session.clock
        eager = self.updater.recording or self.step < self.settled
        forward = self.network if eager else self.compiled
        with clock("forward and backward"):
            with self._autocast():
                logits = forward(images)
                loss = F.cross_entropy(logits, labels, label_smoothing=training.label_smoothing)
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            with torch.no_grad():
                correct = (logits.argmax(1) == labels).sum()
                self.sums += torch.stack(
                    [loss * len(labels), correct, loss.new_tensor(len(labels))]
                ).to(self.sums)
        macs = self.session.config.data.batch * self.forward_macs
        self.macs += macs
        replaced = self.updater.step()
        # Momentum's dense gradient of every step is counted less the alive weights' own.
        self.replaced_macs += (replaced and not self.takes_gradients) * macs
        if not replaced:
            with clock("optimizer"):
                self.scaler.step(self.optimizer)
                self.scaler.update()
        self._log_update()

    def _log_update(self) -> None:
        update, clock = self.updater.last, self.session.clock
        if self.updater.observe_seconds:
            clock.add("growth: observe", self.updater.observe_seconds)
        if update is None or update.step != self.step + 1:
            return
        if self.updater.updates == 1:
            announce_choices(self.session.console, update.searches)
        clock.add("growth: search", update.search_seconds)
        clock.add("growth: apply", update.apply_seconds)
        self.search_flops += update.flops
        with clock("bookkeeping"):
            self._count_weights()
            if update.resized:
                self._wrap()
            self.session.log(
                "update",
                update.step,
                grown=update.grown,
                density=self.density,
                explored=self.updater.explored(),
                explored_share=self.updater.explored_share(),
                search={name: dict(search.report) for name, search in update.searches.items()},
                time={"search": update.search_seconds, "apply": update.apply_seconds},
            )
        self._log_audit()

    def _log_audit(self) -> None:
        audit = self.updater.audited
        if audit is None or audit.step != self.step + 1:
            return
        self.session.clock.add("audit", audit.seconds)
        measured = ("seconds", "reference_seconds", "memory", "reference_memory")
        lines = {name: quality._asdict() for name, quality in audit.quality.items()}
        time = {name: {key: line.pop(key) for key in measured} for name, line in lines.items()}
        for line in lines.values():
            line["report"] = dict(line["report"])
        self.session.log("audit", audit.step, quality=lines, time=time)

    def _look(self) -> tuple[float, float]:
        """Loss and accuracy of the epoch so far; stops the run when the loss is not finite."""
        loss, correct, images = self.sums.tolist()
        if not math.isfinite(loss):
            raise self._diverged(f"the loss became {loss / images}")
        return loss / images, correct / images

    def _diverged(self, what: str) -> StoppedError:
        return StoppedError(
            f"{what} by step {self.step}: start again with a lower --lr, with --warmup or with "
            f"--amp=off{self.session.kept()}"
        )

    def _log_epoch(self, epoch: int) -> None:
        clock, config = self.session.clock, self.session.config
        loss, accuracy = self._reduced_look()
        values: dict[str, Any] = {"train": {"loss": loss, "accuracy": accuracy}}
        if len(self.data.val):
            with clock("evaluation"):
                values["val"] = self.evaluate(self.data.val)
        values["lr"] = self.optimizer.param_groups[0]["lr"]
        values["density"] = {row.name: row.alive / row.total for row in density_table(self.model)}
        values["explored_share"] = self.updater.explored_share()
        values["skipped_updates"] = self.updater.skipped
        self.session.log("epoch", self.step, epoch=epoch + 1, **values, time=dict(clock.seconds))
        val = values.get("val")
        self.session.console.print(
            f"epoch {epoch + 1:3d}/{config.training.epochs}  loss {loss:.4f}  "
            f"train {accuracy:6.2%}" + (f"  val {val['accuracy']:6.2%}" if val else ""),
            highlight=False,
        )

    def _reduced_look(self) -> tuple[float, float]:
        """Over the images of all workers."""
        if world_size() > 1:
            torch.distributed.all_reduce(self.sums)
        return self._look()

    @torch.no_grad()
    def evaluate(self, split: Split) -> dict[str, float]:
        """Loss and accuracy on a whole split, in order, without augmentation."""
        data = self.session.config.data
        self.model.eval()
        loss, correct = 0.0, 0
        # Large images fill the memory where a batch of small ones does not.
        batch = EVAL_BATCH if self.data.image_size <= 64 else min(EVAL_BATCH, data.batch)
        for images, labels in eval_batches(split, self.data, batch, workers=data.workers):
            images, labels = self._to_device(images), labels.to(self.session.device)
            with self._autocast():
                logits = self.model(images)
            loss += float(F.cross_entropy(logits.float(), labels, reduction="sum"))
            correct += int((logits.argmax(1) == labels).sum())
        self.model.train()
        return {"loss": loss / len(split), "accuracy": correct / len(split)}

    def _to_device(self, images: Tensor) -> Tensor:
        last = self.session.config.training.channels_last
        order = torch.channels_last if last else torch.preserve_format
        return images.to(self.session.device, non_blocking=True, memory_format=order)

    def _autocast(self) -> torch.autocast:
        amp = self.session.config.training.amp
        dtype = torch.float16 if amp == "fp16" else torch.bfloat16
        return torch.autocast(self.session.device.type, dtype, enabled=amp != "off")

    def _save_if_due(self) -> None:
        # Vectors recorded for an update to come are not kept in a file: wait until it is done.
        if self.checkpoint_due and not self.updater.holds_records:
            self._save()

    def _save(self) -> None:
        self.checkpoint_due, self.saved_step = False, self.step
        if self.sums[2] > 0:
            self._look()
        sums = self.sums.clone()
        if world_size() > 1:
            torch.distributed.all_reduce(sums)
        if self.session.folder is None:
            return
        # The loss was that of the weights before the last step.
        if not all(bool(p.isfinite().all()) for p in self.model.parameters()):
            raise self._diverged("the weights became NaN or inf")
        with self.session.clock("checkpoint"):
            optimizer_tensors, optimizer_rest = checkpoint.split_optimizer(self.optimizer)
            updater = self.updater.state_dict()
            explored, kept = updater.pop("explored"), updater.pop("states")
            tensors = {
                **{f"model/{k}": v for k, v in self.model.state_dict().items()},
                **{f"optimizer/{k}": v for k, v in optimizer_tensors.items()},
                **{f"explored/{k}": v for k, v in explored.items()},
                **{f"growth/{k}": v for k, v in kept.items()},
                "sums": sums,
            }
            state = {
                "step": self.step,
                "macs": self.macs,
                "replaced_macs": self.replaced_macs,
                "search_flops": self.search_flops,
                "updater": updater,
                "optimizer": optimizer_rest,
                "scaler": self.scaler.state_dict(),
                "compute": self._choices(),
            }
            self.session.save(tensors, state)

    def load(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Continue where a checkpoint was made."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {
                name.removeprefix(prefix): tensor
                for name, tensor in tensors.items()
                if name.startswith(prefix)
            }

        try:
            self.model.load_state_dict(part("model/"))
        except RuntimeError as error:
            raise InputError(
                f"the checkpoint does not fit this model: {' '.join(str(error).split())}"
            ) from None
        checkpoint.join_optimizer(self.optimizer, part("optimizer/"), state["optimizer"])
        self.updater.load_state_dict(
            {**state["updater"], "explored": part("explored/"), "states": part("growth/")}
        )
        self.scaler.load_state_dict(state["scaler"])
        for name, choice in state["compute"].items():
            self.updater.layers[name].chosen = Choice(*choice)
        if rank() == 0:
            # The sums of all workers together: the others go on from nothing.
            self.sums.copy_(tensors["sums"])
        self.step = self.saved_step = state["step"]
        self.macs, self.replaced_macs = state["macs"], state["replaced_macs"]
        self.search_flops = state["search_flops"]
        self._count_weights()
        self._wrap()
        self.session.go_on(tensors, state)

    def _choices(self) -> dict[str, Choice]:
        """How the products of sparse layers are computed where that was decided: kept on resume."""
        layers = self.updater.layers.items()
        return {name: layer.chosen for name, layer in layers if layer.chosen is not None}

    def finish(self) -> Summary:
        """Test once, write the report, show the figures."""
        session, batch = self.session, self.session.config.data.batch
        with session.clock("evaluation"):
            test = self.evaluate(self.data.test)
        dense_macs = sum(cost.dense for cost in self.costs.values())
        cost = training_cost(
            self.macs,
            self.replaced_macs,
            batch * self.step * dense_macs,
            self.search_flops + self.updater.observed_flops,
        )
        seconds = session.clock.seconds
        summary = Summary(
            test_accuracy=test["accuracy"],
            test_loss=test["loss"],
            density=model_density(self.model),
            weights=sum(row.alive for row in density_table(self.model)),
            dense_weights=sum(row.total for row in density_table(self.model)),
            inference_flops=2 * self.forward_macs,
            dense_inference_flops=2 * dense_macs,
            training_flops=cost.flops,
            dense_training_flops=cost.dense_flops,
            explored_share=self.updater.explored_share() if self.updater.layers else 1.0,
            growth_seconds=sum(v for k, v in seconds.items() if k.startswith("growth")),
            wall_seconds=sum(seconds.values()),
        )
        session.log("final", self.step, **dataclasses.asdict(summary))
        if session.folder is not None:
            try:
                report: Path = write(session.folder)
            except OSError as error:
                raise session.disk_error("the report", error) from None
            announce(session.console, summary, report)
        return summary
