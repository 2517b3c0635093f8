"""Arguments of the commands `python -m sweeps.NAME`: a wrong one is one line, like every other wrong request."""

from __future__ import annotations

import argparse
from typing import NoReturn


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, without the usage before an error."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {' '.join(message.split())}; {self.prog} --help shows what is right\n")
