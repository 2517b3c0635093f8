"""A sync brings any sink up to what the store has: each step and each result once, whatever happens in between."""

import json
import random
import shutil

import pytest

from src.store.files import write_jsonl
from src.store.store import StageName, Store
from src.store.sweep_folder import SweepFolder
from src.tracking.runs import RunList, run_lists_below
from src.tracking.sink import RunLocked, RunWriter
from src.tracking.sync import SweepSync
from src.tracking.sync_process import SyncProcess
from src.tracking.watch import SinkSync, watch
from sweeps.aggregate import aggregate
from tests.support.fake_sweep import FakeSweep

CONFIG = {"setup": {"name": "toy"}, "init": {"name": "sft"}, "method": {"name": "dpo"}, "beta": 0.1, "tracking": {}}


class RecordingSink:
    """Keeps what is written to it. `error` is raised by every call; `locked` runs are open in another process."""

    name, title, target, resumable = "recording", "Recording", "here", True

    def __init__(self):
        self.runs, self.error, self.locked = {}, None, set()

    def open(self, run):
        if run.id in self.locked:
            raise RunLocked(run.id)
        writer = self.runs.setdefault(run.id, RecordingWriter(self))
        writer.metadata = run
        return writer


class RecordingWriter(RunWriter):
    def __init__(self, sink):
        self.sink, self.steps, self.results, self.finished, self.tables = sink, [], [], [], {}

    @property
    def last_step(self):
        return max(self.steps, default=-1)

    def log(self, step, metrics):
        if self.sink.error is not None:
            raise self.sink.error
        self.steps.append(step)

    @property
    def result(self):
        return self.results[-1] if self.results else None

    def add_result(self, result, summary):
        self.results.append(result)
        self.summary = summary

    def add_table(self, name, columns, rows):
        self.tables[name] = [dict(zip(columns, row, strict=True)) for row in rows]

    def finish(self, complete):
        self.finished.append(complete)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


@pytest.fixture
def sink():
    return RecordingSink()


def write_stage(folder, kind, upstream, **files):
    folder.mkdir(parents=True, exist_ok=True)
    description = {"stage": kind, "inputs": {}, "upstream": upstream}
    for name, value in {"stage.json": description, "run_config.json": CONFIG | {"sweep": {"name": None}}}.items():
        (folder / name).write_text(json.dumps(value))
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_attempt(store, identity, steps):
    folder = store.work(StageName("align", identity)) / "attempt-1"
    write_stage(folder, "align", {}, metrics=[{"step": step, "loss": 1.0} for step in range(steps)])
    return folder


def write_done_point(store, steps, suffix=""):
    """Write the finished stages of a point; return their identities."""
    stages = {"align": f"align{suffix}", "generate": f"generate{suffix}", "evaluate": f"evaluate{suffix}"}
    upstream = {"align": {}, "generate": {}, "evaluate": {"align": stages["align"], "samples": stages["generate"]}}
    for kind, identity in stages.items():
        folder = store.dir(StageName(kind, identity))
        rows = {
            "align": {"metrics": [{"step": step, "loss": 1.0} for step in range(steps)]},
            "generate": {"samples": [{"index": 0, "prompt": "p", "response": "r", "tokens": 1, "finished": True}]},
        }.get(kind, {})
        write_stage(folder, kind, upstream[kind], **rows)
        (folder / "DONE").write_text(json.dumps({"host": "here", "seconds": 1.0}))
    (folder / "result.json").write_text(json.dumps({"quality": {"value": 0.75}, "stages": []}))
    return stages


def write_sweep(store, stages, **entries):
    folder = SweepFolder(store.sweeps / "toy")
    point = {"setup": "toy", "label": "dpo beta=0.1", "identity": stages["evaluate"], "stages": stages, **entries}
    point |= {"method": "dpo", "init": "sft", "variant": "", "beta": 0.1, "lr": 1.0, "seed": 0}
    record = dict.fromkeys(("command", "store"), "") | dict.fromkeys(("finished", "search")) | {"studies": []}
    record |= {
        "name": "toy",
        "points": [point],
        "tracking": {},
        "code": {},
        "select": "best",
        "keep_checkpoints": "all",
    }
    folder.write(record)
    return RunList(folder.path)


def test_curves_are_live_and_a_second_pass_writes_nothing(store, sink):
    stages = {"align": "align", "generate": "generate", "evaluate": "evaluate"}
    sync = SinkSync(write_sweep(store, stages), sink)
    sync.advance(live=True)
    assert "evaluate" not in sink.runs, "nothing is computed yet"
    attempt = write_attempt(store, "align", steps=3)
    sync.advance(live=True)
    assert sink.runs["evaluate"].steps == [0, 1, 2] and not sink.runs["evaluate"].finished
    with (attempt / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 1.0}\n{"step": 4, "lo')  # a line that is being written
    sync.advance(live=True)
    assert sink.runs["evaluate"].steps == [0, 1, 2, 3]
    write_done_point(store, steps=6)
    for _ in range(2):
        sync.advance(live=True)
    run = sink.runs["evaluate"]
    assert run.steps == list(range(6)) and run.results == ["evaluate"] and run.finished == [True]
    assert run.summary == {"quality/value": 0.75}
    assert (run.metadata.group, run.metadata.name, run.metadata.tags) == ("toy", "dpo beta=0.1", ("toy", "dpo", "sft"))


def test_a_process_that_died_is_continued_by_the_next_without_a_step_twice(store, sink):
    runs = write_sweep(store, {"align": "align", "generate": "generate", "evaluate": "evaluate"})
    write_attempt(store, "align", steps=3)
    SinkSync(runs, sink).advance(live=True)
    write_done_point(store, steps=6)
    for _ in range(2):
        SinkSync(runs, sink).advance(live=False)
    assert sink.runs["evaluate"].steps == list(range(6)) and sink.runs["evaluate"].finished == [True]


def test_a_run_that_another_process_has_open_is_left_to_it(store, sink):
    sync = SinkSync(write_sweep(store, write_done_point(store, steps=3)), sink)
    sink.locked.add("evaluate")
    sync.advance(live=True)
    assert "evaluate" not in sink.runs and sync.failure is None
    sink.locked.clear()
    sync.advance(live=True)
    assert sink.runs["evaluate"].steps == [0, 1, 2]


def test_the_next_rung_continues_the_run_of_the_one_before(store, sink):
    first = write_done_point(store, steps=3, suffix="@0.5")
    second = {"align": "align", "generate": "generate", "evaluate": "evaluate"}
    label = {"label": "dpo beta=0.1 to 50 %"}
    SinkSync(write_sweep(store, first, full_result="evaluate", **label), sink).advance(live=True)
    assert sink.runs["evaluate"].finished == [True]
    runs = write_sweep(store, second, full_result="evaluate", earlier=["evaluate@0.5"])
    sync = SinkSync(runs, sink)
    sync.advance(live=True)
    assert sink.runs["evaluate"].finished == [True], "the second rung has not started"
    write_done_point(store, steps=6)
    sync.advance(live=True)
    run = sink.runs["evaluate"]
    assert run.steps == list(range(6)) and run.results == ["evaluate@0.5", "evaluate"]
    assert run.finished == [True, True] and run.metadata.name == "dpo beta=0.1"


ANY_TEXT = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\r", "\x1c", "\x00", "😀", '"\\\n', "x" * 100_000]


def test_samples_of_any_text_arrive_as_they_are(store, sink):
    stages = write_done_point(store, steps=3)
    texts = [f"a{text}b" for text in ANY_TEXT]
    rows = [{"index": n, "prompt": text, "response": text} for n, text in enumerate(texts)]
    write_jsonl(store.dir(StageName("generate", "generate")) / "samples.jsonl", rows)
    judged = [{"index": n, "verdict": 1.0, "reason": text} for n, text in enumerate(texts)]
    write_jsonl(store.dir(StageName("evaluate", "evaluate")) / "judgements.jsonl", judged)
    sync = SinkSync(write_sweep(store, stages), sink)
    sync.advance(live=True)
    assert sync.failures == []
    table = sink.runs["evaluate"].tables["samples"]
    for name in ("prompt", "response", "reason"):
        assert [row[name] for row in table] == texts


@pytest.mark.parametrize("several", [1, 2])
def test_samples_of_one_prompt_are_told_apart_where_there_are_several(several, store, sink):
    stages = write_done_point(store, steps=3)
    keys = [{"index": i // several} | ({"sample": i % several} if several > 1 else {}) for i in range(4)]
    rows = [key | {"prompt": "p", "response": f"r{i}"} for i, key in enumerate(keys)]
    write_jsonl(store.dir(StageName("generate", "generate")) / "samples.jsonl", rows)
    judged = [key | {"verdict": float(i), "reason": ""} for i, key in enumerate(keys)]
    write_jsonl(store.dir(StageName("evaluate", "evaluate")) / "judgements.jsonl", judged)
    SinkSync(write_sweep(store, stages), sink).advance(live=True)
    table = sink.runs["evaluate"].tables["samples"]
    assert [{name: row[name] for name in keys[0]} for row in table] == keys and ("sample" in table[0]) == (several > 1)
    assert [(row["response"], row["verdict"]) for row in table] == [(f"r{i}", float(i)) for i in range(4)]


@pytest.mark.parametrize(
    ("kind", "name", "content"),
    [
        ("generate", "samples.jsonl", "garbage\n"),
        ("generate", "samples.jsonl", '{"prompt": 1}\n'),
        ("align", "metrics.jsonl", "garbage\n"),
        ("align", "metrics.jsonl", '{"step": "x"}\n'),
        ("align", "metrics.jsonl", "[]\n"),
        ("evaluate", "result.json", "[]"),
        ("evaluate", "run_config.json", "{}"),
        ("evaluate", "DONE", "garbage"),
    ],
)
def test_a_run_with_a_damaged_file_does_not_stop_the_others(kind, name, content, store, sink):
    write_done_point(store, steps=3, suffix="-other")
    stages = write_done_point(store, steps=3)
    runs = write_sweep(store, stages)
    record = runs.sweep.read()
    other = {role: f"{role}-other" for role in stages}
    record["points"].append(record["points"][0] | {"identity": other["evaluate"], "stages": other})
    runs.sweep.write(record)
    (store.dir(StageName(kind, stages[kind])) / name).write_text(content)
    sync = SinkSync(runs, sink)
    for _ in range(2):
        sync.advance(live=True, last=True)
    assert sink.runs["evaluate-other"].finished == [True] and sync.failure is None
    (failure,) = sync.failures
    assert failure.startswith("Recording: run evaluate: ") and "\n" not in failure
    assert True not in (sink.runs["evaluate"].finished if "evaluate" in sink.runs else [])


def test_a_damaged_note_of_what_a_sink_has_only_writes_it_again(store, sink):
    runs = write_sweep(store, write_done_point(store, steps=3))
    SinkSync(runs, sink).advance(live=True)
    (note,) = (store.output_dir / "tracking" / "recording").glob("evaluate.json")
    note.write_text("garbage")
    sync = SinkSync(runs, sink)
    sync.advance(live=True)
    assert sync.failures == [] and sink.runs["evaluate"].steps == [0, 1, 2]


def test_one_unreadable_list_of_runs_does_not_hide_the_others(store, capsys):
    write_sweep(store, write_done_point(store, steps=3))
    for name, content in {"a": "garbage", "b": "{}", "c": "[]"}.items():
        SweepFolder(store.sweeps / name).path.mkdir()
        SweepFolder(store.sweeps / name).record.write_text(content)
    single = store.output_dir / "tracking" / "runs" / "x.json"
    single.parent.mkdir(parents=True)
    single.write_text('{"points": [1]}')
    assert [runs.sweep.name for runs in run_lists_below(store.output_dir)] == ["toy"]
    assert capsys.readouterr().err.count("warning: ") == 4


def test_a_process_that_cannot_start_is_one_warning(store, capfd):
    runs = write_sweep(store, write_done_point(store, steps=3))
    runs.sweep.write(runs.sweep.read() | {"tracking": {"name": "tensorboard", "tensorboard": {"enabled": True}}})
    for log_file in (runs.sweep.record / "sync.log", runs.sweep.path / ("x" * 300)):
        with SyncProcess(runs.sweep.path, log_file) as process:
            process.start()
        error = capfd.readouterr().err
        assert error.count("warning: upload incomplete (") == 1 and len(error.strip().splitlines()) == 1


def test_a_sink_that_fails_does_not_stop_another(store, sink):
    runs, broken = write_sweep(store, write_done_point(store, steps=3)), RecordingSink()
    broken.name, broken.error = "broken", OSError("no server")
    syncs = [SinkSync(runs, broken), SinkSync(runs, sink)]
    watch(syncs, lambda seconds: True)
    assert syncs[0].failure == "Recording: OSError: no server" and syncs[1].failure is None
    assert sink.runs["evaluate"].finished == [True]
    broken.error = None
    SinkSync(runs, broken).advance(live=False)
    assert broken.runs["evaluate"].steps == [0, 1, 2] and broken.runs["evaluate"].finished == [True]


def test_another_server_gets_everything_and_offline_files_only_what_no_server_has(store, sink):
    runs, other, offline = write_sweep(store, write_done_point(store, steps=3)), RecordingSink(), RecordingSink()
    other.target, offline.target = "elsewhere", ""
    for each in (sink, offline, other):
        SinkSync(runs, each).advance(live=True)
    assert sink.runs["evaluate"].finished == other.runs["evaluate"].finished == [True]
    assert "evaluate" not in offline.runs


def test_only_runs_of_the_given_stages_are_synced(store, sink):
    runs = write_sweep(store, write_done_point(store, steps=3))
    SinkSync(runs, sink, stages=["another"]).advance(live=True)
    assert not sink.runs
    SinkSync(runs, sink, stages=["align"]).advance(live=True)
    assert list(sink.runs) == ["evaluate"], "and the sweep's own run is not"


def test_a_sweep_of_which_no_point_is_done_is_synced_without_a_table(sink, tmp_path):
    sweep = FakeSweep(tmp_path, random.Random(0), betas=(0.1,))
    sweep.record |= {"code": None, "finished": "now"}

    def sync_once():
        for point in sweep.points:
            point["state"] = "done" if sweep.store.is_done(StageName("evaluate", point["identity"])) else "failed"
        sweep.folder.write(sweep.record)
        aggregate([sweep.folder], quiet=True)
        SweepSync(sweep.folder, sink).advance(live=False)
        (run,) = sink.runs.values()
        return run

    for point in sweep.points:
        sweep.align(point)
        sweep.evaluate(point)
    assert list(sync_once().tables) == ["tables/best"]  # the control
    for point in sweep.points:
        shutil.rmtree(sweep.store.dir(StageName("evaluate", point["identity"])))
    sink.runs.clear()
    run = sync_once()
    assert run.summary == {"points/failed": 4} and not run.tables
    assert not list(sweep.folder.tables.glob("best.*")), "the table of an earlier aggregation"
