"""One run of the study: configuration, planning, the stages, and everything they compute with."""

import os

__version__ = "0.2.0"

# Libraries that would write over our progress display, or warn about processes that they do not know of.
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
