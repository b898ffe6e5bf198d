"""Training one model over some epochs, resumable at every step: what recipes are made of."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from dst import checkpoint
from dst.computing import how_computed
from dst.config import parse_interval
from dst.convert import density_table, model_density
from dst.data import Dataset, Split, eval_batches, train_loader
from dst.distributed import ignore_topology, rank, world_size
from dst.errors import StoppedError
from dst.flops import dense_training_flops, image_cost, layer_costs, training_flops
from dst.layers import Choice
from dst.mam import set_beta
from dst.methods import DropGrow
from dst.progress import ProgressBar
from dst.recipes.session import Session
from dst.recipes.setup import example_of
from dst.report import Summary, announce, announce_choices, write
from dst.schedules import BetaSchedule, LearningRate
from dst.updater import TopologyUpdater
from growth import InputError, Momentum

# Steps between two looks at the loss: each waits for the device.
LOOK_EVERY = 10
EVAL_BATCH = 500


class Fit:
    """A model in training, and how far it is.

    start, end: steps of the run between which it is trained; a recipe of several phases has one
    after another. lr: at its highest; the config's by default. beta: of MAM layers, by the steps of
    this phase. kept: what the recipe wants to
    find in the checkpoint again. flops, replaced_flops, search_flops: what was spent so far, by
    earlier phases as well if the recipe says so.
    """

    def __init__(
        self,
        session: Session,
        data: Dataset,
        model: nn.Module,
        optimizer: Optimizer,
        scaler: torch.amp.GradScaler,
        updater: TopologyUpdater,
        steps_per_epoch: int,
        end: int,
        *,
        start: int = 0,
        lr: float | None = None,
        beta: BetaSchedule | None = None,
        kept: Mapping[str, Any] | None = None,
    ) -> None:
        self.session, self.data, self.model = session, data, model
        self.optimizer, self.scaler, self.updater = optimizer, scaler, updater
        self.steps_per_epoch, self.start, self.end = steps_per_epoch, start, end
        self.lr = session.config.training.lr if lr is None else lr
        self.beta, self.kept = beta, dict(kept or {})
        self.beta_now: float | None = None
        self.step = self.saved_step = start
        try:
            self.costs = layer_costs(model, example_of(data, session.device))
        except AttributeError as error:
            if not updater.layers:
                raise
            raise InputError(
                f"model {session.config.model} does not run with sparse layers ({error}): keep "
                "those dense whose weight it reads itself, as in --skip='*.qkv'"
            ) from None
        self._count_weights()
        # Of all images so far; of the forward pass of those of steps that an update replaced.
        self.flops = self.replaced_flops = self.search_flops = 0
        # Sums over the epoch so far: loss, correct predictions, images.
        self.sums = torch.zeros(3, dtype=torch.float64, device=session.device)
        config = session.config
        self.checkpoint_interval = parse_interval(
            "checkpoint-interval", config.run.checkpoint_interval, steps_per_epoch
        )
        self.checkpoint_due = self.told = False
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
        self.image_cost = image_cost(self.model, self.costs, alive)

    def run(self, rate: LearningRate) -> None:
        """Train to the end of the last epoch. rate: over the steps of this phase."""
        session = self.session
        session.started_up()
        with ProgressBar(session.console, self.end, self.step) as bar:
            while self.step < self.end:
                epoch = self.step // self.steps_per_epoch
                self._train_epoch(epoch, rate, bar)
                self._log_epoch(epoch)
                self.sums.zero_()
                self._save_if_due()
        self._vanish()
        # The end is always kept, whatever the interval.
        if self.saved_step != self.step:
            self.save()

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
        label = f"epoch {epoch + 1}/{self.last_epoch}"
        for _ in range(self.step % self.steps_per_epoch, self.steps_per_epoch):
            # A checkpoint inside an epoch is due before the step after it, so that the end of an
            # epoch is saved with its metrics.
            self._save_if_due()
            with clock("data"):
                images, labels = next(loader)
                images = self.session.to_device(images)
                labels = labels.to(self.session.device, non_blocking=True)
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * rate.at(self.step - self.start)
            self._vanish()
            self._train_step(images, labels)
            if config.run.verbose and not self.told:
                self.told = True
                with self.session.autocast():
                    for line in how_computed(self.updater.layers):
                        self.session.console.print(line, highlight=False, soft_wrap=True)
            self.step += 1
            self.checkpoint_due |= self.step % self.checkpoint_interval == 0
            bar.advance(config.data.batch)
            if self.step % LOOK_EVERY == 0:
                loss, accuracy = self._look()
                bar.show(label, loss, accuracy, self.density)

    @property
    def last_epoch(self) -> int:
        return self.end // self.steps_per_epoch

    def _vanish(self) -> None:
        """Give MAM layers the beta of the coming step."""
        if self.beta is None:
            return
        before, now = self.beta_now, self.beta.at(self.step - self.start)
        if now != before:
            set_beta(self.model, now)
            self.beta_now = now
            # In between, the products that are computed are the same ones.
            if before in (None, 0.0, 1.0) or now in (0.0, 1.0):
                self._count_weights()

    def _train_step(self, images: Tensor, labels: Tensor) -> None:
        training, clock = self.session.config.training, self.session.clock
        eager = self.updater.recording or self.step < self.settled
        forward = self.network if eager else self.compiled
        with clock("forward and backward"):
            with self.session.autocast():
                logits = forward(images)
                loss = F.cross_entropy(logits, labels, label_smoothing=training.label_smoothing)
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            with torch.no_grad():
                correct = (logits.argmax(1) == labels).sum()
                self.sums += torch.stack(
                    [loss * len(labels), correct, loss.new_tensor(len(labels))]
                ).to(self.sums)
        batch = self.session.config.data.batch
        self.flops += batch * sum(self.image_cost)
        replaced = self.updater.step()
        # Momentum's dense gradient of every step is counted less the alive weights' own.
        if replaced and not self.takes_gradients:
            self.replaced_flops += batch * self.image_cost.forward
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
        clock = self.session.clock
        loss, accuracy = self._reduced_look()
        values: dict[str, Any] = {"train": {"loss": loss, "accuracy": accuracy}}
        if len(self.data.val):
            with clock("evaluation"):
                values["val"] = self.evaluate(self.data.val)
        values["lr"] = self.optimizer.param_groups[0]["lr"]
        values["density"] = {row.name: row.alive / row.total for row in density_table(self.model)}
        if self.beta_now is not None:
            values["beta"] = self.beta_now
        values["explored_share"] = self.updater.explored_share()
        values["skipped_updates"] = self.updater.skipped
        self.session.log("epoch", self.step, epoch=epoch + 1, **values, time=dict(clock.seconds))
        val = values.get("val")
        self.session.console.print(
            f"epoch {epoch + 1:3d}/{self.last_epoch}  loss {loss:.4f}  "
            f"train {accuracy:6.2%}" + (f"  val {val['accuracy']:6.2%}" if val else ""),
            highlight=False,
        )

    def log_phase(self, name: str) -> None:
        """What a phase of a recipe came to, for the report."""
        with self.session.clock("evaluation"):
            splits = {"val": self.data.val, "test": self.data.test}
            found = {key: self.evaluate(split) for key, split in splits.items() if len(split)}
        self.session.log(
            "phase",
            self.step,
            phase=name,
            **found,
            weights=sum(row.alive for row in density_table(self.model)),
            inference_flops=self.image_cost.forward,
            training_flops=self._training_flops(),
        )
        self.session.console.print(f"{name}: test {found['test']['accuracy']:.2%}", highlight=False)

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
            images, labels = self.session.to_device(images), labels.to(self.session.device)
            with self.session.autocast():
                logits = self.model(images)
            loss += float(F.cross_entropy(logits.float(), labels, reduction="sum"))
            correct += int((logits.argmax(1) == labels).sum())
        self.model.train()
        return {"loss": loss / len(split), "accuracy": correct / len(split)}

    def _save_if_due(self) -> None:
        # Vectors recorded for an update to come are not kept in a file: wait until it is done.
        if self.checkpoint_due and not self.updater.holds_records:
            self.save()

    def save(self) -> None:
        """Write the checkpoint; nothing that comes before it is done again."""
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
                "flops": self.flops,
                "replaced_flops": self.replaced_flops,
                "search_flops": self.search_flops,
                "updater": updater,
                "optimizer": optimizer_rest,
                "scaler": self.scaler.state_dict(),
                "compute": self._choices(),
                "kept": self.kept,
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
        self.flops, self.replaced_flops = state["flops"], state["replaced_flops"]
        self.search_flops = state["search_flops"]
        self._count_weights()
        self._wrap()
        self.session.go_on(tensors, state)

    def _choices(self) -> dict[str, Choice]:
        """How the products of sparse layers are computed where that was decided: kept on resume."""
        layers = self.updater.layers.items()
        return {name: layer.chosen for name, layer in layers if layer.chosen is not None}

    def _training_flops(self) -> int:
        searched = self.search_flops + self.updater.observed_flops
        return training_flops(self.flops, self.replaced_flops, searched)

    def finish(self) -> Summary:
        """Test once, write the report, show the figures."""
        session, batch = self.session, self.session.config.data.batch
        with session.clock("evaluation"):
            test = self.evaluate(self.data.test)
        dense_macs = sum(cost.dense for cost in self.costs.values())
        dense_flops = dense_training_flops(batch * self.step * dense_macs)
        seconds = session.clock.seconds
        summary = Summary(
            test_accuracy=test["accuracy"],
            test_loss=test["loss"],
            density=model_density(self.model),
            weights=sum(row.alive for row in density_table(self.model)),
            dense_weights=sum(row.total for row in density_table(self.model)),
            inference_flops=self.image_cost.forward,
            dense_inference_flops=2 * dense_macs,
            training_flops=self._training_flops(),
            dense_training_flops=dense_flops,
            # What was dense in an earlier phase was alive then.
            explored_share=(
                self.updater.explored_share() if self.updater.layers and not self.start else 1.0
            ),
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
