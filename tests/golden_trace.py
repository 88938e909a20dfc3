"""Makes `golden_trace.json`: 20-step losses of a LoRA and a full run on the tiny model.

Run from the repository's root: `PYTHONPATH=train python -m tests.golden_trace`.
"""

import json
import tempfile
from pathlib import Path

import pytest

from tests import conftest

RUNS = {
    "lora": {"lora": True, "lora_rank": 4, "lora_alpha": 8, "learning_rate": 3e-3},
    "full": {"tunable_parts": "vision_tower,projector,language_model", "learning_rate": 1e-3, "gradient_accumulation_steps": 2},
}


class Recorder:
    """Runs the trace inside pytest, so that the fixtures are the tests' own."""

    def test_record(self, make_arguments, tmp_path):
        """Writes the losses."""
        from interlace.training.supervised import finetune

        losses = {}
        for name, changes in RUNS.items():
            data = conftest.write_rows(tmp_path / f"data_{name}", 24)
            arguments = make_arguments(data, **changes, max_steps=20, output_dir=str(tmp_path / name))
            finetune(arguments)
            state = json.loads((tmp_path / name / "trainer_state.json").read_text())
            losses[name] = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
        path = Path(__file__).with_name("golden_trace.json")
        path.write_text(json.dumps({"runs": RUNS, "losses": losses}, indent=1) + "\n")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        raise SystemExit(
            pytest.main([f"{__file__}::Recorder::test_record", f"--basetemp={folder}/run", "-o", "python_classes=Recorder", "-o", "python_files=*.py"])
        )
