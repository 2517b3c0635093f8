"""The plugins that Hydra discovers: it searches this namespace only. The code is in sweeps and launchers."""

from hydra.core.config_store import ConfigStore

from launchers.local import LocalLauncher as _LocalLauncher
from launchers.slurm.launcher import SlurmLauncher as _SlurmLauncher
from launchers.slurm.options import schema
from sweeps.sweeper import GridSweeper as _GridSweeper
from sweeps.sweeper import PowerSweeper as _PowerSweeper

ConfigStore.instance().store(group="hydra/launcher", name="slurm_schema", node=schema())


class GridSweeper(_GridSweeper):
    pass


class PowerSweeper(_PowerSweeper):
    pass


class LocalLauncher(_LocalLauncher):
    pass


class SlurmLauncher(_SlurmLauncher):
    pass
