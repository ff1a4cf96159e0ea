"""An exported folder on the hub: private unless told otherwise, and never by surprise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mergesearch.merging.checkpoints.locations import is_hub_name
from mergesearch.merging.errors import InputError
from mergesearch.merging.foreign.json_text import read_json
from mergesearch.merging.foreign.node import Node
from mergesearch.merging.foreign.reading import read_text
from mergesearch.merging.foreign.shown import name_shown, path_shown, shown

if TYPE_CHECKING:
    from huggingface_hub import HfApi

#: Text files that name the sources of a merge.
_NAMING = ("README.md", "recipe.yaml", "recipe.json", "mergekit_config.yml")


@dataclass(frozen=True)
class PushTarget:
    """A repository of the hub.

    Attributes:
        repository: ``org/name``.
        public: Whether everybody may see it; private otherwise.
        dry_run: Whether files are only listed.
    """

    repository: str
    public: bool = False
    dry_run: bool = False

    def check(self) -> None:
        """Refuse what cannot be pushed to, before anything is merged.

        Raises:
            InputError: If the name is none, nobody is logged in, or the repository is public
                without leave.
        """
        if not is_hub_name(self.repository) or "@" in self.repository:
            raise InputError(
                f"--push-to: expected org/name without a revision, received "
                f"{shown(self.repository)}"
            )
        if self.dry_run:
            return
        with _hub_errors(self.repository):
            api = _api()
            api.whoami()
            if not self.public and api.repo_exists(self.repository):
                self._check_private(api)

    def push(self, folder: Path) -> str:
        """Upload a folder as one commit, and return where it is.

        Raises:
            InputError: If the hub refuses.
        """
        with _hub_errors(self.repository):
            api = _api()
            api.create_repo(self.repository, private=not self.public, exist_ok=True)
            if not self.public:
                self._check_private(api)
            commit = api.upload_folder(
                repo_id=self.repository, folder_path=folder, commit_message="Merge by mergesearch"
            )
        return str(commit.commit_url)

    def _check_private(self, api: HfApi) -> None:
        if not api.model_info(self.repository).private:
            raise InputError(
                f"--push-to: expected a private repository, received {self.repository}, which is "
                "public; say --public to write to it"
            )


def _api() -> HfApi:
    from huggingface_hub import HfApi, constants

    return HfApi(endpoint=constants.ENDPOINT)


@contextmanager
def _hub_errors(repository: str) -> Iterator[None]:
    """Refusals of the hub in one line."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    # Its bases are OSError and the error of the HTTP library that the client is built on.
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise InputError(
            "--push-to: expected a token of the hub, received none; set HF_TOKEN or log in with "
            "`hf auth login`"
        ) from error
    except (*HfHubHTTPError.__bases__, ValueError) as error:
        reason = name_shown(str(error).strip().split("\n")[0], 150)
        raise InputError(
            f"--push-to: expected {repository} to take the files, received "
            f"{type(error).__name__}: {reason}"
        ) from error


def listed_files(folder: Path) -> list[tuple[str, int]]:
    """Name and bytes of every file that would be uploaded, sorted."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(str(path.relative_to(folder)), path.stat().st_size) for path in files]


def local_names(folder: Path) -> list[str]:
    """Files of an export that name folders of this machine."""
    recipe = folder / "recipe.json"
    if not recipe.is_file():
        return []
    data = Node(read_json(recipe), path_shown(recipe))
    sources = (data.at("base"), *data.at("experts").elements())
    paths = [source.at("path").text() for source in sources]
    local = [path for path in paths if Path(path).is_absolute()]
    texts = {name: folder / name for name in _NAMING if (folder / name).is_file()}
    return [name for name, path in texts.items() if any(each in read_text(path) for each in local)]
