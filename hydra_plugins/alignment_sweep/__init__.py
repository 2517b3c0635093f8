"""What Hydra discovers: it takes sweepers and launchers from this namespace only. The code is in sweeps and launchers."""

from launchers.local import LocalLauncher as _LocalLauncher
from sweeps.grid import GridSweeper as _GridSweeper


class GridSweeper(_GridSweeper):
    pass


class LocalLauncher(_LocalLauncher):
    pass
