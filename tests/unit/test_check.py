"""What --check says of models, of their adapters and of the gateway, and what it ends with."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from rich.console import Console

from worker.config import CONFIGS, KEY_NAMES, REPOSITORY, Settings, load_settings
from worker.modelfiles import MANIFEST
from worker.supervisor import check

ADAPTERS = """
[[adapters]]
id = "style"
kind = "ip_adapter"
model = "demo-image"
path = "ip/style.safetensors"
image_encoder = "ip/encoder"
source = {repository = "a/b"}
image_encoder_source = {repository = "a/b"}

[[adapters]]
id = "frames"
kind = "vace"
model = "demo-video"
path = "vace"
source = {repository = "a/b"}
"""
GRAIN = """
[[adapters]]
id = "grain"
kind = "lora"
model = "demo-image"
path = "grain.safetensors"
"""
GATEWAY = """
[gateway]
port = 7999
"""
# The least that is taken for one of its kind.
LAYERS = {
    "style": {"image_proj.proj.weight": (4, 2), "ip_adapter.1.to_k_ip.weight": (2, 2)},
    "grain": {"lora_unet_mid.lora_down.weight": (1, 2), "lora_unet_mid.lora_up.weight": (2, 1)},
    "other": {"w": (3, 1)},
}


def safetensors(tensors: Mapping[str, tuple[int, int]]) -> bytes:
    """Of bytes, all of them zero."""
    header, begin = {}, 0
    for name, shape in tensors.items():
        end = begin + shape[0] * shape[1]
        header[name] = {"dtype": "U8", "shape": shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(begin)


@dataclass
class Pod:
    """A models folder, a profile and what --check says of them."""

    folder: Path
    profile: str = ADAPTERS
    said: str = ""
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def models(self) -> Path:
        return self.folder / "models"

    def write(self, name: str, content: bytes) -> None:
        path = self.models / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def record(self, folder: str, *names: str) -> None:
        files = {}
        for name in names:
            content = (self.models / folder / name).read_bytes()
            sha256 = hashlib.sha256(content).hexdigest()
            files[name] = {"size": len(content), "sha256": sha256}
        self.write(f"{folder}/{MANIFEST}", json.dumps({"files": files}).encode())

    def with_style(self) -> Pod:
        self.write("ip/style.safetensors", safetensors(LAYERS["style"]))
        self.write("ip/encoder/config.json", b"{}")
        self.write("ip/encoder/model.safetensors", safetensors(LAYERS["other"]))
        self.record("ip", "style.safetensors")
        self.record("ip/encoder", "config.json", "model.safetensors")
        return self

    def settings(self) -> Settings:
        demo = (CONFIGS / "demo.toml").read_text()
        path = self.folder / "mine.toml"
        kept = [
            part
            for part in demo.split("\n[")
            if not part.startswith(("gateway", "residency"))
        ]  # fmt: skip
        path.write_text("\n[".join(kept) + self.profile)
        folders = {
            "VERBATIM_MODELS_DIR": str(self.models),
            "VERBATIM_STATE_DIR": str(self.folder / "state"),
        }
        inherited = {name: value for name, value in os.environ.items() if name not in KEY_NAMES}
        self.environment = inherited | folders
        return load_settings(str(path), self.environment)

    def look(self) -> dict[str, check.Finding]:
        settings = self.settings()
        chat, media = check.validate(settings, ())
        output = io.StringIO()
        console = Console(file=output, width=200)
        findings = check.look(settings, chat, media, console)
        check.show_plan(settings, findings, None, (), None, console)
        self.said = output.getvalue()
        return {one.id: one for one in findings}

    def run(self) -> subprocess.CompletedProcess[str]:
        """orchestrator.py --check, as an operator has it."""
        self.settings()
        arguments = ("--check", "--profile", str(self.folder / "mine.toml"))
        return subprocess.run(
            [sys.executable, str(REPOSITORY / "orchestrator.py"), *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
        )


@pytest.fixture
def pod(tmp_path: Path) -> Pod:
    (tmp_path / "models").mkdir()
    return Pod(tmp_path)


def test_an_adapter_that_nobody_has_fetched_is_absent_and_no_problem(pod: Pod) -> None:
    found = pod.look()

    assert {found[name].files for name in ("style", "frames")} == {"absent"}
    assert not any(one.problems for one in found.values())
    assert (
        "style: absent, and not used; to have it, run python scripts/fetch_models.py style"
        in pod.said
    )
    assert "4 good, 2 absent" in pod.said


def test_what_is_recorded_of_an_adapter_is_hashed(pod: Pod) -> None:
    pod.with_style()

    found = pod.look()

    assert found["style"].files == "good"
    sizes = [(pod.models / "ip" / name).stat().st_size for name in (
        "style.safetensors", "encoder/config.json", "encoder/model.safetensors"
    )]  # fmt: skip
    assert found["style"].hashed_bytes == sum(sizes)
    assert found["style"].weight_bytes == sizes[0] + sizes[2]
    assert found["style"].use == "for demo-image"


@pytest.mark.parametrize("name", ["style.safetensors", "encoder/model.safetensors"])
def test_a_flipped_byte_of_an_adapter_is_a_problem_with_its_cure(pod: Pod, name: str) -> None:
    pod.with_style()
    file = pod.models / "ip" / name
    file.write_bytes(file.read_bytes()[:-1] + b"!")

    found = pod.look()

    assert found["style"].files == "PROBLEM"
    [problem] = found["style"].problems
    assert problem.path == str(file)
    assert "is damaged: sha256" in problem.what
    assert f"{problem}; ".count("run python scripts/fetch_models.py style") == 1
    assert str(file) in pod.said


def test_half_an_adapter_is_a_problem(pod: Pod) -> None:
    pod.with_style()
    shutil.rmtree(pod.models / "ip" / "encoder")

    assert pod.look()["style"].files == "PROBLEM"


def test_an_adapter_without_a_record_is_said_to_have_none(pod: Pod) -> None:
    pod.profile = ADAPTERS + GRAIN
    pod.write("grain.safetensors", safetensors(LAYERS["grain"]))

    assert pod.look()["grain"].files == "no record"
    assert "1 no record" in pod.said and "only headers can be checked" in pod.said


def test_a_lora_of_the_profile_whose_file_is_missing_is_a_problem(pod: Pod) -> None:
    pod.profile = GRAIN

    [problem] = pod.look()["grain"].problems

    assert problem.what == "is missing"
    assert problem.cure == "put its files there, or correct its paths in the catalog"


@pytest.mark.parametrize("name", ["lokr_w1", "lora_mid.weight"])
def test_an_adapter_of_another_kind_is_found_before_a_job_needs_it(pod: Pod, name: str) -> None:
    pod.profile = GRAIN
    pod.write("grain.safetensors", safetensors({f"lora_unet_mid.{name}": (1, 1)}))

    [problem] = pod.look()["grain"].problems

    assert "is not supported" in problem.what


def test_a_damaged_vace_transformer_is_found(pod: Pod) -> None:
    pod.write("vace/config.json", b"{}")
    pod.write("vace/diffusion_pytorch_model.safetensors", safetensors(LAYERS["other"]))
    pod.record("vace", "config.json", "diffusion_pytorch_model.safetensors")
    assert pod.look()["frames"].files == "good"
    pod.write("vace/config.json", b"[]")

    [problem] = pod.look()["frames"].problems

    assert problem.path == str(pod.models / "vace" / "config.json")


# --- the gateway ------------------------------------------------------------------------------


def test_without_a_gateway_none_is_asked(pod: Pod) -> None:
    assert check.ask_gateway(pod.settings(), {}) is None


def test_the_gateway_checks_itself_with_what_it_would_be_started_with(pod: Pod) -> None:
    pod.profile = GATEWAY
    settings = pod.settings()

    found = check.ask_gateway(settings, pod.environment)

    assert found is not None and found.is_good
    assert "database: is migrated at the next start" in found.lines
    assert not settings.state_dir.exists()  # it makes nothing


def test_what_the_gateway_says_of_wrong_settings_is_shown_and_decides_the_exit_code(
    pod: Pod,
) -> None:
    pod.profile = GATEWAY + 'on_mismatch = "shrug"\n'

    done = pod.run()

    assert done.returncode == 8
    assert "gateway: error:" in done.stdout and "on_mismatch" in done.stdout
    assert "gateway: its check ended with 3; correct what it names, and look again with: " in (
        done.stdout
    )
    assert f"python -m gateway --profile {pod.folder / 'mine.toml'} check" in done.stdout


def test_a_database_that_does_not_answer_is_told(pod: Pod) -> None:
    pod.profile = GATEWAY
    settings = pod.settings()
    nobody = "postgresql://user:secret@127.0.0.1:1/none"

    found = check.ask_gateway(settings, pod.environment | {"GATEWAY_DATABASE_URL": nobody})

    assert found is not None and found.code == 1
    assert any(line.startswith("database: ") for line in found.lines)
    assert "secret" not in "".join(found.lines)


def test_a_gateway_that_does_not_end_is_told(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    pod.profile = GATEWAY
    monkeypatch.setattr(check, "GATEWAY_S", 0.01)

    found = check.ask_gateway(pod.settings(), pod.environment)

    assert found is not None and not found.is_good
    assert found.lines == ("no answer within 0 s",)


def test_damaged_files_count_more_than_the_gateway(pod: Pod) -> None:
    pod.profile = GRAIN + GATEWAY + 'on_mismatch = "shrug"\n'

    done = pod.run()

    assert done.returncode == 4
    assert "gateway: its check ended with 3" in done.stdout


def test_a_pod_that_is_good_ends_with_zero(pod: Pod) -> None:
    pod.with_style().profile = ADAPTERS + GATEWAY

    done = pod.run()

    assert done.returncode == 0, done.stdout + done.stderr
    assert "gateway: good" in done.stdout
