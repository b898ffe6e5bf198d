"""What every recipe begins with, as a config describes it: data, network, optimizer, rate."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from dst.config import Config, parse_shares
from dst.data import Dataset, load
from dst.models import build
from dst.pretrained import load_weights
from dst.schedules import LearningRate


def load_data(config: Config) -> Dataset:
    data = config.data
    return load(
        data.data,
        data_dir=data.data_dir,
        download=data.download,
        difficulty=data.data_difficulty,
        split_seed=data.split_seed,
        val_size=data.val_size,
        image_size=data.image_size,
    )


def new_model(
    config: Config, data: Dataset, device: torch.device, *, weights: bool = True
) -> nn.Module:
    """The dense network. Built on the CPU, so that its weights are the same for every device.
    weights: whether to start from the config's file, if it names one; a checkpoint has its own."""
    model = build(
        config.model,
        in_channels=data.in_channels,
        image_size=data.image_size,
        classes=data.classes,
        dropout=config.dropout,
    )
    if weights and config.weights is not None:
        load_weights(model, config.weights)
    return model.to(device)


def example_of(data: Dataset, device: torch.device) -> Tensor:
    """One image, with its batch dimension."""
    return torch.zeros(1, data.in_channels, data.image_size, data.image_size, device=device)


def new_scaler(config: Config, device: torch.device) -> torch.amp.GradScaler:
    return torch.amp.GradScaler(device.type, enabled=config.training.amp == "fp16")


def new_optimizer(config: Config, model: nn.Module) -> Optimizer:
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


def learning_rate(config: Config, total: int) -> LearningRate:
    """total: steps that it is spread over."""
    training = config.training
    return LearningRate(
        total,
        training.lr_schedule,
        training.warmup,
        parse_shares(training.lr_milestones),
        training.lr_factor,
    )
