"""Options of the SLURM launcher, composed as the command line composes them."""

from __future__ import annotations

from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from launchers.slurm.options import SlurmOptions, complete_options
from src.config.hydra_setup import register
from src.config.schema import CONF_DIR


def slurm_options(launcher: str = "slurm", **values: Any) -> SlurmOptions:
    """Return the checked options of a launcher with some replaced. Raises ConfigError as the command would."""
    register()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = compose("train", overrides=[f"hydra/launcher={launcher}"], return_hydra_config=True)
    composed = OmegaConf.to_container(OmegaConf.merge(config.hydra.launcher, values))
    assert isinstance(composed, dict)
    return complete_options({str(key): value for key, value in composed.items()})
