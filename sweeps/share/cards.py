"""The README.md of every published folder, with the metadata that the Hugging Face Hub reads."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from src.store.files import atomic_write, read_json
from src.store.integrity import DONE
from sweeps.recorded_command import without
from sweeps.report.escapes import markdown_cell
from sweeps.report.plot_style import NAMES
from sweeps.report.table_files import markdown_text
from sweeps.report.tables import BEST, NOT_SIGNIFICANT, best_table, change_with_error, with_error
from sweeps.share.chosen import ChosenModel, PublishedSweep
from sweeps.share.model_folder import FIGURE, sampling_options
from sweeps.share.training_data import describe_data, hub_tables

TEMPLATES = Path(__file__).parent / "templates"
README = "README.md"
PROJECT = "alignment-sweep"
NO_LICENSE = "None has been chosen yet, so nobody may use this. `--license LICENSE` writes it here and in the metadata."
CONFIGS = {  # of the data set
    "points": "one row a point: settings, quality of each split, KL, reward accuracy, seconds",
    "best": "the selected points: averages over seeds, intervals",
    "samples": "responses to held-out prompts, with log-probs of policy and initial model, KL; nats",
    "judgements": "verdict of every comparison, by which judge, and the split its prompt is in",
    "metrics": "one row an optimizer step of alignment",
    "validation": "one row a validation pair: loss, reward margin, log-probs of chosen and rejected response",
}


@dataclass(frozen=True)
class Publication:
    """What all cards of a study say. license: None where none was given."""

    study: PublishedSweep
    data_set: str  # name of the repository
    license: str | None

    @property
    def command(self) -> str:
        """The command of the sweep, without output_dir, which names a folder of this machine."""
        return shlex.join(without(shlex.split(self.study.record["command"]), ["output_dir"]))

    def shared(self) -> dict[str, Any]:
        """Return what every template needs."""
        return {
            "sweep": self.study.folder.name,
            "data_set": f"[{self.data_set}](https://huggingface.co/datasets/{self.data_set})",
            "command": self.command,
            "license": self.license or NO_LICENSE,
        }


def write_model_card(
    folder: Path,
    repository: str,
    model: ChosenModel,
    base: str | None,
    publication: Publication,
    adapter_base: str | None,
) -> None:
    """Write the card of an aligned model.

    base: name on the hub of the model that the study began with, None where it is not known. adapter_base: of the
    model that adapters belong to; None for a whole model.
    """
    row, sampling = model.row, model.config["evaluation"]["generation"]
    relation = "adapter" if adapter_base else "finetune"
    metadata = _metadata(publication.license, adapter_base or base, relation)
    metadata["library_name"] = "peft" if adapter_base else "transformers"
    metadata["pipeline_tag"] = "text-generation"
    metadata |= _tables_used(model.config, model.sft is not None)
    metadata["tags"] = [PROJECT, "preference-optimization", row["method"]]
    settings = ", ".join(f"{name} {sampling[name]:g}" for name in ("temperature", "top_k", "top_p", "max_new_tokens"))
    options = {"max_new_tokens": sampling["max_new_tokens"], **sampling_options(sampling)}
    where = "given above" if adapter_base else "those of `generation_config.json`"
    has_tokenizer = (folder / "tokenizer_config.json").exists()
    _write(
        folder,
        "model_card.md.jinja",
        publication,
        metadata=_yaml(metadata),
        repository=repository,
        name=NAMES[model.method],
        kind=row["kind"],
        weights=_describe_weights(model, base, adapter_base),
        rows=[(name, markdown_cell(value)) for name, value in _measured(model).items()],
        quality=_metric(row),
        figure=f"{FIGURE}.png" if (folder / f"{FIGURE}.png").exists() else None,
        is_adapter=adapter_base is not None,
        base=adapter_base,
        tokenizer=repository if has_tokenizer else adapter_base,
        is_plain=model.config["model"]["template"] == "plain",
        sampling="".join(f", {name}={value!r}" for name, value in options.items()) if adapter_base else "",
        generation=f"Samples of the study have these settings, {where}: {settings}.",
        training=describe_data(model.config, model.checkpoint, model.sft),
        made=_describe_making(publication.study, [model.checkpoint]),
    )


def write_sft_card(
    folder: Path, repository: str, model: ChosenModel, base: str | None, publication: Publication
) -> None:
    """Write the card of the SFT model that adapters belong to. model: one that started from it."""
    assert model.sft is not None
    metadata = _metadata(publication.license, base, "finetune")
    metadata |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    metadata |= _tables_used(model.config, with_sft=True, with_pairs=False)
    metadata["tags"] = [PROJECT, "sft"]
    _write(
        folder,
        "sft_card.md.jinja",
        publication,
        metadata=_yaml(metadata),
        repository=repository,
        training=describe_data(model.config, None, model.sft),
        made=_describe_making(publication.study, [model.sft]),
    )


def write_data_card(folder: Path, publication: Publication, counts: Mapping[str, int], archive: str) -> None:
    """Write the card of the data set. counts: config -> rows. archive: name of the file that has the whole study."""
    study = publication.study
    metadata = _metadata(publication.license)
    metadata["pretty_name"] = f"{study.folder.name}: a sweep of alignment methods"
    metadata["tags"] = [PROJECT, "preference-optimization"]
    configs = [{"config_name": name, "data_files": f"{name}.parquet"} for name in counts]
    metadata["configs"] = [{**entry, "default": True} if not i else entry for i, entry in enumerate(configs)]
    table = best_table(study.best, study.differences)
    lines = list(dict.fromkeys(line for m in study.models for line in describe_data(m.config, m.checkpoint, m.sft)))
    models = ", ".join(f"`{model.name}`" for model in study.models)
    files = sorted({Path(file).name for m in study.models if (file := m.config["evaluation"]["prompts_file"])})
    _write(
        folder,
        "data_card.md.jinja",
        publication,
        metadata=_yaml(metadata),
        repository=publication.data_set,
        num_done=study.num_done,
        num_points=len(study.results.points),
        selected=f"Models of it are published: {models}." if models else "Its models are not published.",
        configs=[(name, count, CONFIGS[name]) for name, count in counts.items()],
        archive=archive,
        best=markdown_text(list(table.columns), table.map(markdown_cell).to_numpy().tolist()),
        training=lines,
        prompts=f"The questions of {', '.join(files)}" if files else "Held-out rows of these",
        made=_describe_making(study, [path for path in study.checkpoints if (path / DONE).exists()]),
    )


def _write(folder: Path, template: str, publication: Publication, **values: Any) -> None:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    text = environment.get_template(template).render(**publication.shared(), **values)
    atomic_write(folder / README, text.encode(errors="replace"))


def _metadata(license: str | None, base: str | None = None, relation: str | None = None) -> dict[str, Any]:
    metadata: dict[str, Any] = {"license": license} if license else {}
    return metadata | ({"base_model": base, "base_model_relation": relation} if base else {})


def _tables_used(config: Mapping[str, Any], with_sft: bool, with_pairs: bool = True) -> dict[str, list[str]]:
    names = hub_tables(config, with_sft, with_pairs)
    return {"datasets": names} if names else {}


def _yaml(metadata: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=True)


def _metric(row: Mapping[str, Any]) -> str:
    return str(row["metric"]).replace("_", " ").capitalize()


def _describe_weights(model: ChosenModel, base: str | None, adapter_base: str | None) -> str:
    start = "the SFT model of the study" if model.sft is not None else "the base model"
    local = f"a model that is not on the hub (`model={model.config['model']['name']}`)"
    began = f"[{base}](https://huggingface.co/{base})" if base else local
    if adapter_base:
        what = f"The files are LoRA adapters of [{adapter_base}](https://huggingface.co/{adapter_base})"
        what += f", {start}; the study began with {began}." if model.sft is not None else f", {start}."
    else:
        what = f"The weights are whole; alignment started from {start}, the study from {began}."
    if (seeds := int(model.row["seeds"])) > 1:
        what += f" Measurements are means over {seeds} seeds, the weights those of seed {model.row['seed']}."
    return what


def _measured(model: ChosenModel) -> dict[str, str]:
    """Return the rows of the card's table."""
    row, judge = model.row, model.config["judge"]
    betas, lrs, seeds = (sorted(model.grid[name].unique()) for name in ("beta", "lr", "seed"))
    done = int((model.grid.state == "done").sum())
    low, high = row["quality_reporting_low"], row["quality_reporting_high"]
    quality = "not judged"
    if not pd.isna(low):
        quality = f"{row['quality_reporting']:.3f} [{low:.3f}, {high:.3f}], {_gap(model.gap)}"
    rows = {"Method": f"{NAMES[model.method]} (method={model.method})"}
    rows |= {"Variant": str(row["variant"])} if row["variant"] else {}
    rows |= {
        "Beta": f"{row['beta']:g}",
        "Learning rate": f"{row['lr']:g}",
        "Seeds": ", ".join(f"{seed}" for seed in seeds),
        "Grid": f"beta {_values(betas)}; learning rate {_values(lrs)}; {done} of {len(model.grid)} points have results",
        f"{_metric(row)} on {model.num_prompts} reporting prompts (95 % interval)": quality,
        f"{_metric(row)} on the selection prompts": with_error(
            row["quality_selection"], row["quality_selection_se"], 3
        ),
    }
    if judge["name"] != "none":
        against = f"against {judge['baseline']}" if row["metric"] == "win_rate" else None
        rows["Judge"] = ", ".join(filter(None, [judge["name"], judge["model"], against]))
    rows |= {
        "KL to the initial model, nats per sequence": with_error(row["kl_sequence"], row["kl_sequence_se"], 2),
        "KL to the initial model, nats per token": with_error(row["kl_token"], row["kl_token_se"], 3),
        "Reward accuracy, all validation pairs": with_error(row["reward_accuracy"], None, 3),
        "Response length, tokens": with_error(row["response_tokens"], None, 1),
    }
    if not pd.isna(row["capability_change"]):
        rows["Capability, change from the SFT model"] = change_with_error(row)
    return rows


def _gap(gap: str) -> str:
    """Return in words the gap to the best method, as the table of the selected points has it."""
    if gap == BEST:
        return "the best of the methods"
    different = gap != NOT_SIGNIFICANT
    return f"{gap.lstrip('-')} below the best method" if different else "not significantly below the best method"


def _values(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _describe_making(study: PublishedSweep, folders: Iterable[Path]) -> str:
    """Return one paragraph: code revision, versions of packages, and the hardware of these stages."""
    code = study.record.get("code") or {}
    commit = f"commit `{code['commit']}`" if code.get("commit") else "an unknown commit"
    changed = " with uncommitted changes" if code.get("dirty") else ""
    versions: dict[str, None] = {}
    gpus: dict[str, None] = {}
    for folder in folders:
        done = read_json(folder / DONE)
        versions[", ".join(f"{name} {number}" for name, number in done.get("versions", {}).items())] = None
        gpus[(done.get("gpu") or {}).get("name") or "CPU"] = None
    return (
        f"{PROJECT} at {commit}{changed}; {' or '.join(filter(None, versions)) or 'unknown versions'}; "
        f"on {' and '.join(gpus)}. `output_dir` of the command is left out."
    )
