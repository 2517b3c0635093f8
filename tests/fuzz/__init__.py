"""Seeded fuzzing of the commands: random overrides, random rows, random damage to a finished store.

`python -m tests.fuzz --seed 0 --cases 500`. docs/reliability.md says what is checked.
"""
