"""Write the folders that are uploaded: one a model, and the data set."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from src.errors import ConfigError
from src.store.attempt import Report
from src.store.files import remove
from src.store.lease import Lease
from sweeps.share.cards import Publication, write_data_card, write_model_card, write_sft_card
from sweeps.share.chosen import ChosenModel, PublishedSweep
from sweeps.share.data_set import write_data_set
from sweeps.share.model_folder import (
    base_of,
    check_sft,
    draw_figure,
    write_adapter_base,
    write_weights,
)
from sweeps.share.upload import Repository, check_repository
from sweeps.study.archive import write_archive
from sweeps.study.secret_check import SecretCheck

DATA_SET = "study"  # folder of the data set
ARCHIVE = "study.zip"
MARK = ".alignment-sweep"  # file that says that a folder was written here, and may be replaced


def write_folders(
    target: Path,
    study: PublishedSweep,
    to: str,
    license: str | None = None,
    base_model: str | None = None,
    report: Report = lambda *_: None,
) -> list[Repository]:
    """Write a folder for every model and one for the data set, and return the repositories that they are meant for.

    The target appears whole and replaces what an earlier call wrote. to: USER/NAME, of the data set; those of the
    models are USER/NAME-METHOD. base_model: name on the hub of a base model that was local. Raises ConfigError when
    the target has other files, another process writes it, or adapters have a base that nobody could load.
    """
    publication = Publication(study, to, license)
    with _replacing(target) as draft:
        repositories = _write_models(draft, study.models, publication, base_model, report)
        check_repository("--to", to)
        counts = write_data_set(draft / DATA_SET, study)
        write_archive(study.folder, draft / DATA_SET / ARCHIVE)  # which checks every row for secrets, too
        write_data_card(draft / DATA_SET, publication, counts, ARCHIVE)
        _check_secrets(draft)
        rows = ", ".join(f"{count} {name}" for name, count in counts.items() if name in ("points", "samples"))
        repositories.append(Repository(draft / DATA_SET, to, "dataset", rows))
    return [Repository(target / r.folder.name, r.name, r.kind, r.summary) for r in repositories]


def _write_models(
    draft: Path, models: Sequence[ChosenModel], publication: Publication, base_model: str | None, report: Report
) -> list[Repository]:
    repositories: list[Repository] = []
    sft_names: dict[Path, str] = {}  # SFT models that adapters belong to -> their repositories
    for number, model in enumerate(models, 1):
        base = base_of(model, base_model)
        adapter_base, tokenizer = base.name, base.local
        if model.is_adapter and model.sft is not None:
            if model.sft not in sft_names:
                name = f"sft-{len(sft_names) + 1}" if sft_names else "sft"
                sft_names[model.sft] = f"{publication.data_set}-{name}"
                check_sft(model.sft)
                write_weights(model.sft, draft / name, model.config)
                write_sft_card(draft / name, sft_names[model.sft], model, base.name, publication)
                repositories.append(
                    Repository(draft / name, sft_names[model.sft], "model", "SFT, base of the adapters")
                )
            adapter_base, tokenizer = sft_names[model.sft], model.sft
        elif model.is_adapter and base.name is None:
            raise ConfigError(
                f"the model of {model.method} is adapters of {model.config['model']['path']}, which is not on the hub: "
                "--base-model USER/NAME says where it is, or publish whole models (model.lora.publish=merged)"
            )
        repository = f"{publication.data_set}-{model.name}"
        check_repository("--to", repository)
        folder = draft / model.name
        write_weights(model.checkpoint, folder, model.config, tokenizer if model.is_adapter else None)
        if model.is_adapter:
            assert adapter_base is not None
            write_adapter_base(folder, adapter_base)
        draw_figure(model, folder)
        of_model = adapter_base if model.is_adapter else None
        write_model_card(folder, repository, model, base.name, publication, of_model)
        summary = f"{model.method} beta={model.row['beta']:g} lr={model.row['lr']:g}"
        repositories.append(Repository(folder, repository, "model", summary))
        report("models", number, len(models))
    return repositories


def _check_secrets(folder: Path) -> None:
    """Raise ConfigError for a secret in what is written here of texts of users: cards and chat templates."""
    for path in sorted([*folder.rglob("*.md"), *folder.rglob("*.jinja")]):
        for _ in SecretCheck().pieces(str(path.relative_to(folder)), [path.read_bytes()]):
            pass


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """Yield a new folder beside the target, which becomes the target when the body ends without an error."""
    check_target(target)
    target = Path(os.path.abspath(target))  # `.` and `..` have no name that others could be made of
    target.parent.mkdir(parents=True, exist_ok=True)
    draft, old = (target.with_name(f".{target.name}.{name}") for name in ("draft", "old"))
    work = target.with_name(f".{target.name}.lease")
    with Lease(work, lambda holder: True) as lease:
        if not lease.held:
            raise ConfigError(f"{target}: another process is writing it; wait, or give another folder, --folder=FOLDER")
        for path in (draft, old):  # of a call that was killed
            remove(path)
        try:
            draft.mkdir()
            (draft / MARK).touch()
            yield draft
            if target.exists():
                target.rename(old)
            draft.rename(target)
        finally:
            remove(draft)
            remove(old)
            shutil.rmtree(work, ignore_errors=True)


def check_target(target: Path) -> None:
    """Raise ConfigError when the folder has files that this program did not write."""
    if target.is_dir() and not (target / MARK).exists() and any(target.iterdir()):
        raise ConfigError(f"--folder={target}: has other files; name a new folder, or an empty one")
