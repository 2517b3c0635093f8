"""The first command of the README on a file of 60,000 pairs, 8 steps each: `python -m benchmarks.large_file`.

Target: 12 minutes on two cores. Needs `make smollm2`. Prompts have about 40 words and responses about 30. Prints the
wall time, the CPU time, which other work on the machine hardly changes, and the wall time of every stage.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from src.store.store import DONE

NUM_PAIRS = 60_000
PROMPT_WORDS, RESPONSE_WORDS = (30, 50), (20, 40)
WORDS = """a about after all and answer any are as ask at be because before book but by can change city come could day
do does each every example explain few find first for from garden give good great had has have her his house how idea if
in into is it its just know large last letter like list little long make many may more most much must my name never new
not now number of off old on one only or other our out over part people place plan question rain read river say school
see she short should show sky small so some story such summer take tell than that the their them then there these they
thing think this time to town tree two under up us use very was water way we well were what when where which who why
will with word work world would write year you your""".split()


def write_pairs(path: Path, count: int) -> Path:
    """Write random pairs as JSON lines; return the path."""
    rng = random.Random(0)

    def text(fewest: int, most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(fewest, most))).capitalize() + "."

    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            row = {"prompt": text(*PROMPT_WORDS), "chosen": text(*RESPONSE_WORDS), "rejected": text(*RESPONSE_WORDS)}
            file.write(json.dumps(row) + "\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=NUM_PAIRS)
    count = parser.parse_args().pairs
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arguments = ["setup=smollm2_jsonl", f"dataset.path={write_pairs(folder / 'pairs.jsonl', count)}", "method=dpo"]
        arguments += ["trainer.sft.max_steps=8", "trainer.align.max_steps=8", f"output_dir={folder}"]
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "src.train", *arguments, "tracking=none"], check=True)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds, of_cores = time.perf_counter() - started, used.ru_utime + used.ru_stime
        print(f"{count} pairs: {seconds:.0f} s in all, {of_cores:.0f} s of CPU cores")
        records = [json.loads(done.read_text()) for done in (folder / "store").glob(f"*/*/{DONE}")]
        for record in sorted(records, key=lambda record: record["finished"]):
            loading, tokens = record["loading_seconds"], record["tokens"]
            print(f"  {record['stage']:9} {record['seconds']:6.1f} s, {loading:.1f} s of it loading; {tokens} tokens")


if __name__ == "__main__":
    main()
