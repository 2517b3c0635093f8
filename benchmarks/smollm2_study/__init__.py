"""A study of a real model on real preference pairs with a laptop: its data, and its page docs/smollm2.md."""
