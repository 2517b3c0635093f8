"""What one job does."""

import os

# Libraries that would speak over our own progress, or warn about processes they do not see being spawned.
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
