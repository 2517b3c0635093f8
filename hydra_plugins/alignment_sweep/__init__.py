"""What Hydra discovers, for it takes plugins from this namespace only; the code is in sweeps and launchers."""

from launchers.local import LocalLauncher as _LocalLauncher
from launchers.slurm.launcher import SlurmLauncher as _SlurmLauncher
from sweeps.grid import GridSweeper as _GridSweeper


class GridSweeper(_GridSweeper):
    pass


class LocalLauncher(_LocalLauncher):
    pass


class SlurmLauncher(_SlurmLauncher):
    pass
