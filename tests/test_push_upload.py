"""`python -m sweeps.push --upload`: the calls that it makes of the hub, to stubs and by the hub's own client."""

from types import SimpleNamespace
from unittest.mock import create_autospec

import huggingface_hub
import pytest

from tests.support.hub_server import Hub
from tests.support.published import publishable_sweep, push, refusal


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return publishable_sweep(tmp_path_factory.mktemp("published"))


@pytest.fixture
def hub(monkeypatch):
    """Stand for the functions of huggingface_hub, with their own signatures; return the calls."""
    made = SimpleNamespace(calls=[], private=True, fails_at=None)

    def stub(name):
        def call(*arguments, **options):
            made.calls.append((name, options))
            if (name, options["repo_id"]) == made.fails_at:
                raise OSError(28, "quota of the account\nis exhausted")
            return SimpleNamespace(private=made.private)

        function = create_autospec(getattr(huggingface_hub, name), side_effect=call)
        monkeypatch.setattr(huggingface_hub, name, function)

    for name in ("create_repo", "repo_info", "upload_folder"):
        stub(name)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test_that_is_long_enough")
    return made


def test_the_upload_makes_the_calls_that_a_dry_run_prints(sweep, hub):
    for option in ((), ("--dry-run",)):
        dry = push(sweep, *option)
        assert dry.returncode == 0 and not hub.calls and "no license yet" in dry.stdout
    printed = [line for line in dry.stdout.splitlines() if line.startswith("huggingface_hub.")]
    done = push(sweep, "--upload", "--license=mit")
    assert done.returncode == 0, done.stderr
    made = [(name, options) for name, options in hub.calls if name != "repo_info"]
    assert printed == [
        f"huggingface_hub.{n}({', '.join(f'{k}={v!r}' for k, v in options.items())})" for n, options in made
    ]
    names = {"me/demo-dpo": "model", "me/demo-nca": "model", "me/demo": "dataset"}
    for function in ("create_repo", "upload_folder"):
        assert {o["repo_id"]: o["repo_type"] for name, o in made if name == function} == names
    assert all(options["private"] for name, options in made if name == "create_repo")
    hub.private = False
    assert push(sweep, "--upload", "--license=mit", "--public").returncode == 0
    assert not any(options["private"] for name, options in hub.calls[len(hub.calls) // 2 :] if name == "create_repo")


def test_the_client_of_the_hub_uploads_every_file_into_private_repositories(sweep, monkeypatch):
    hub = Hub()
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test_that_is_long_enough")
    try:
        hub.refused = "me/demo-nca"
        message = refusal(push(sweep, "--license=mit", "--upload"), 1)
        assert "storage limit reached" in message
        assert "uploaded: model me/demo-dpo; not uploaded: model me/demo-nca" in message
        hub.refused = None
        hub.repositories["model", "me/demo-dpo"]["adapter_config.json"] = b"{}"  # of an earlier upload
        assert push(sweep, "--license=mit", "--upload").returncode == 0
        for (kind, name), files in hub.repositories.items():
            folder = sweep.hub / ("study" if kind == "dataset" else name.removeprefix("me/demo-"))
            assert files == {path.name: path.read_bytes() for path in folder.iterdir()}
        assert len(hub.private) == len(hub.repositories) == 3
    finally:
        hub.close()


def test_a_failed_upload_says_what_is_there_and_the_same_command_continues(sweep, hub):
    hub.fails_at = ("upload_folder", "me/demo-nca")
    message = refusal(push(sweep, "--upload", "--license=mit"), 1)
    assert "upload_folder of me/demo-nca: quota of the account is exhausted" in message.replace("\\n", " ")
    assert "uploaded: model me/demo-dpo; not uploaded: model me/demo-nca, dataset me/demo; the same command" in message
    hub.fails_at = None
    assert push(sweep, "--upload", "--license=mit").returncode == 0
    hub.fails_at = ("create_repo", "me/demo")
    assert "uploaded: nothing; not uploaded: model me/demo-dpo" in refusal(push(sweep, "--upload", "--license=mit"), 1)


def test_nothing_is_uploaded_into_a_repository_that_is_public_or_without_license_or_token(sweep, hub, monkeypatch):
    assert "exists and is private: make it public" in refusal(push(sweep, "--upload", "--license=mit", "--public"))
    hub.private = False
    assert "exists and is public: give --public" in refusal(push(sweep, "--upload", "--license=mit"))
    assert "Add --license=" in refusal(push(sweep, "--upload"))
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert "not logged in" in refusal(push(sweep, "--upload", "--license=mit", "--public"))
    assert not [name for name, _ in hub.calls if name == "upload_folder"]


@pytest.mark.parametrize("name", ["demo", "me/", "a/b/c", "me/x--y", "me/" + "x" * 97, "me/x.git", "me/x y"])
def test_a_name_that_the_hub_does_not_take_is_refused_before_anything_is_read(name, sweep):
    assert "is no name of a repository: USER/NAME" in refusal(push(sweep, to=name))
