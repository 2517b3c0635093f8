"""Configs and points composed as the command line composes them."""

from __future__ import annotations

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from src.config.hydra_setup import register
from src.config.schema import CONF_DIR, Point
from src.config.validation import build_point


def composed(*overrides: str) -> DictConfig:
    register()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose("train", overrides=list(overrides))


def point(*overrides: str) -> Point:
    return build_point(composed(*overrides))
