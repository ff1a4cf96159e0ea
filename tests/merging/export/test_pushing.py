"""Uploads to the hub, against one on this machine: private, listed first, refused early."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mergesearch.merging import InputError
from mergesearch.merging.export.pushing import PushTarget, listed_files, local_names
from tests.merging.export.fake_hub import FakeHub, Repository, fake_hub


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub(monkeypatch) as hub:
        yield hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "heads").mkdir()
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "README.md").write_text("---\ntags:\n- merge\n---\n# A merge of /data/base\n")
    (tmp_path / "heads" / "config.json").write_text("{}")
    return tmp_path


def test_every_file_arrives_in_a_private_repository(server: FakeHub, folder: Path) -> None:
    target = PushTarget("org/merge")
    target.check()
    assert target.push(folder).endswith(f"/org/merge/commit/{'0' * 40}")
    repository = server.repositories["org/merge"]
    assert repository.private
    assert repository.files == {
        name: (folder / name).read_bytes()
        for name in ("README.md", "heads/config.json", "model.safetensors")
    }
    target.check()  # a second time, it is there
    target.push(folder)


def test_public_only_when_asked_for(server: FakeHub, folder: Path) -> None:
    PushTarget("org/open", public=True).push(folder)
    assert not server.repositories["org/open"].private


def test_a_public_repository_is_not_written_to_by_surprise(server: FakeHub, folder: Path) -> None:
    server.repositories["org/known"] = Repository(private=False)
    target = PushTarget("org/known")
    for act in (target.check, lambda: target.push(folder)):
        with pytest.raises(InputError, match="which is public; say --public to write to it"):
            act()
    assert server.repositories["org/known"].files == {}


def test_nobody_is_asked_in_a_dry_run(server: FakeHub, folder: Path) -> None:
    PushTarget("org/merge", dry_run=True).check()
    assert server.requests == []
    assert [name for name, _ in listed_files(folder)] == [
        "README.md",
        "heads/config.json",
        "model.safetensors",
    ]


@pytest.mark.parametrize("name", ["merge", "org/merge@v1", "a/b/c", ""])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(InputError, match="expected org/name without a revision"):
        PushTarget(name, dry_run=True).check()


@pytest.mark.parametrize("token", ["hf_other", None])
def test_without_a_token_it_is_refused_before_anything_is_merged(
    token: str | None, server: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(InputError, match=r"^--push-to: expected") as caught:
        PushTarget("org/merge").check()
    assert "\n" not in str(caught.value)
    assert server.repositories == {}


def test_a_hub_that_is_away_is_one_line(server: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"ConnectError: .*refused"):
        PushTarget("org/merge").check()


def test_files_that_name_this_machine(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(
        '{"base": {"path": "/data/base"}, "experts": [{"path": "org/one"}]}'
    )
    (tmp_path / "README.md").write_text("| base | `/data/base` |")
    (tmp_path / "recipe.yaml").write_text("base: org/one")
    assert local_names(tmp_path) == ["README.md", "recipe.json"]
