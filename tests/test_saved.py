"""What a run, a merge and a conversion leave on the disk: who may read it, what goes to the hub, what transformers makes of it."""

import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, RepoUrl
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoProcessor

from interlace.model.conversion import to_hub
from interlace.model.loading import load_for_inference, load_model, load_processing
from interlace.model.merging import merge
from interlace.training.supervised import finetune
from tests.conftest import write_rows
from tests.small_families import make_model as make_family
from tests.test_conversion import make_model, original_weights, write_original

Make = Callable[..., dict[str, Any]]
LORA = {"lora": True, "lora_rank": 4, "lora_alpha": 8}


# --- who may read it ---


@pytest.fixture(params=[0o022, 0o027], ids=["022", "027"])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): stat.S_IMODE(path.lstat().st_mode) for path in folder.rglob("*") if path.is_file() and not path.is_symlink()}


def test_files_have_the_mode_that_the_umask_allows(make_arguments: Make, tmp_path: Path, umask: int) -> None:
    """Of finished runs with their checkpoints, of merged and of converted models, and of what lies beside them; folders likewise."""
    original = write_original(tmp_path / "original", "interleave", original_weights(make_model("interleave"), "interleave"))
    (original / "LICENSE").write_text("for research")
    (original / "LICENSE").chmod(0o600)
    rows = write_rows(tmp_path / "data", 8)
    common = {"model_name_or_path": str(original), "max_steps": 1, "max_length": 512, "save_strategy": "steps", "save_steps": 1}
    finetune(make_arguments(rows, **common, **LORA, output_dir=str(tmp_path / "adapter")))
    finetune(make_arguments(rows, **common, output_dir=str(tmp_path / "full")))
    merge(str(tmp_path / "adapter"), tmp_path / "merged")
    to_hub(str(original), tmp_path / "hub")
    for name in ("adapter", "full", "merged", "hub"):
        found = modes(tmp_path / name)
        assert {"adapter": "adapter_model.safetensors"}.get(name, "model.safetensors") in found
        assert {"LICENSE", "llava_original/weights.safetensors"} <= set(found)
        assert {file: oct(mode) for file, mode in found.items() if mode != 0o666 & ~umask} == {}
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o777 & ~umask
    assert any("checkpoint-1/optimizer-" in file for file in modes(tmp_path / "full"))
    assert not list(tmp_path.rglob("*.mode"))


# --- what goes to the hub ---

RECORDS = {  # of the run, for those who made it
    *("arguments.json", "environment.json", "ledger.json", "trainer_state.json", "train_results.json", "all_results.json", "report.html"),
    *("row_report.parquet", "row_report.json", "row_drop.json", "loss_spikes.jsonl"),
}


@pytest.mark.parametrize("changes", [LORA, {}], ids=["adapter", "whole"])
@pytest.mark.parametrize("family", ["qwen2_vl", "llava"])
def test_what_is_uploaded_is_all_that_a_fresh_load_needs(
    make_arguments: Make, tmp_path: Path, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch, family: str, changes: dict[str, Any]
) -> None:
    """Every file of a finished run is either a record of the run or uploaded, and what is uploaded loads as the run's own folder does."""
    base = tmp_path / "base"
    if family == "llava":
        shutil.copytree(tiny_dir, base)
    else:
        base.mkdir()
        base = make_family(family, base)
    (base / "LICENSE").write_text("for research")
    (base / "video_preprocessor_config.json").write_text('{"video_processor_type": "Qwen2VLVideoProcessor"}')
    uploaded = tmp_path / "uploaded"

    def upload(self: HfApi, *, folder_path: Path, allow_patterns: list[str], ignore_patterns: list[str], **_: Any) -> None:
        names = [str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (uploaded / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(folder_path) / name, uploaded / name)

    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **_: RepoUrl(f"https://huggingface.co/me/{name}"))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    arguments = make_arguments(write_rows(tmp_path / "data", 8), model_name_or_path=str(base), **changes, max_steps=1, push_to_hub=True)
    finetune(arguments)
    run, sent = Path(arguments["output_dir"]), {str(path.relative_to(uploaded)) for path in uploaded.rglob("*")}
    assert {path.name for path in run.iterdir() if path.is_file() and not path.name.startswith(".")} - RECORDS == sent
    assert {"video_preprocessor_config.json", "LICENSE", "chat_template.jinja", "training_curves.png"} <= sent
    ours, theirs = (load_model(str(folder), torch.float32) if not changes else load_for_inference(str(folder), torch.float32) for folder in (run, uploaded))
    assert all(torch.equal(one, theirs.state_dict()[name]) for name, one in ours.state_dict().items())
    one, two = (load_processing(str(folder)) for folder in (run, uploaded))
    assert one.template.fingerprint == two.template.fingerprint
    assert one.image_processor.to_dict() == two.image_processor.to_dict()
    if family == "llava":
        assert AutoProcessor.from_pretrained(uploaded).to_dict() == AutoProcessor.from_pretrained(run).to_dict()
