"""The demo models that are shipped: whole, small, described, and known to the demo profile only."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from worker.catalog import SHIPPED_MODELS, chat_catalog, media_catalog
from worker.config import CONFIGS, REPOSITORY, load_settings
from worker.modelfiles import check_files, read_header

NAMES = ("demo-chat", "demo-image", "demo-video")


def weight_files(name: str) -> list[Path]:
    return sorted((SHIPPED_MODELS / name).rglob("*.safetensors"))


@pytest.mark.parametrize("models_dir", ["", "/nowhere"])
def test_every_demo_model_is_there_and_whole_wherever_other_models_are(models_dir: str) -> None:
    settings = load_settings("demo", {"VERBATIM_MODELS_DIR": models_dir})
    specs = (*chat_catalog(settings).specs, *media_catalog(settings).specs)

    assert {spec.path.name for spec in specs} == set(NAMES)
    assert [problem for spec in specs for problem in check_files(spec, full=True)] == []


@pytest.mark.parametrize("name", NAMES)
def test_the_manifest_lists_every_file_but_itself_and_the_card(name: str) -> None:
    folder = SHIPPED_MODELS / name
    listed = json.loads((folder / "manifest.json").read_bytes())["files"]
    present = {
        file.relative_to(folder).as_posix()
        for file in folder.rglob("*")
        if file.is_file() and file.name not in ("manifest.json", "README.md")
    }

    assert set(listed) == present


def test_all_weights_together_stay_below_24_megabytes_in_half_precision() -> None:
    files = [file for name in NAMES for file in weight_files(name)]
    headers = [read_header(file) for file in files]
    kinds = {
        entry["dtype"] for header in headers for key, entry in header.items() if "dtype" in entry
    }

    assert sum(file.stat().st_size for file in files) <= 24e6
    assert kinds == {"BF16"}


def test_the_chat_model_has_at_most_five_million_weights() -> None:
    [file] = weight_files("demo-chat")

    assert file.stat().st_size < 2 * 5_000_000


@pytest.mark.parametrize("name", NAMES)
def test_a_card_tells_what_the_model_is_and_is_not(name: str) -> None:
    card = (SHIPPED_MODELS / name / "README.md").read_text("utf-8").lower()

    for word in ("demo model", "data", "parameters", "steps", "figures", "limits"):
        assert word in card, word


def test_nothing_in_the_daemon_knows_the_demo_models_by_name() -> None:
    files = [*(REPOSITORY / "worker").rglob("*.py"), REPOSITORY / "orchestrator.py"]
    told = [str(file) for file in files if any(name in file.read_text() for name in NAMES)]

    assert told == []
    assert "demo-chat" in (CONFIGS / "demo.toml").read_text()


def test_git_keeps_every_file_of_the_demo_models() -> None:
    result = subprocess.run(
        ["git", "check-ignore", "--no-index", *(str(f) for n in NAMES for f in weight_files(n))],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    if "not a git repository" in result.stderr:
        pytest.skip("this is no checkout")

    assert result.stdout == ""
