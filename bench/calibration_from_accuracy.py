"""The demo model's calibration, out of the accuracy table that was measured already.

    python bench/calibration_from_accuracy.py --input bench/results/accuracy_cpu.json \
        --output python/optimus/assets/demo/calibration.json

Nothing is run: bench/accuracy_table.py keeps one 0/1 per prompt and arm, and that is all that a
calibration needs. The commit and the machine are those of the table.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from optimus.cache import model_hash
from optimus.calibrate import tasks_hash
from optimus.calibration import Arm, Calibration
from optimus.config import DEMO_MODEL, load_checkpoint
from optimus.evaluate import load_tasks
from optimus.grow import weights_sha256


def convert(table: dict[str, Any]) -> Calibration:
    """Raises ValueError for a table without block decoding at one of its thresholds."""
    settings = table["arguments"]
    path = DEMO_MODEL if settings["model"] is None else Path(settings["model"])
    checkpoint = load_checkpoint(path)
    tasks = load_tasks(settings["tasks"], settings["num_prompts"])
    block = {a["threshold"]: a for a in table["arms"] if a["mode"] == "block"}
    found = Calibration(
        model_hash(path),
        weights_sha256(path),
        checkpoint.block_length or 1,
        {
            "tasks_hash": tasks_hash(tasks),
            "num_prompts": len(tasks),
            "max_tokens": settings["max_tokens"],
            "dtype": settings["dtype"],
            "raw": False,
            "temperature": 0.0,
        },
        table["machine"],
        table["commit"],
    )
    for arm in table["arms"]:
        if arm["mode"] == "ar":
            continue
        # A chunk of one commits its candidate at any threshold: it was run once.
        thresholds = [arm["threshold"]] if "threshold" in arm else list(block)
        for threshold in thresholds:
            if threshold not in block:
                raise ValueError(f"the table lacks block decoding at threshold {threshold}")
            found.arms.append(
                Arm.of(
                    threshold,
                    arm.get("chunk_length"),
                    arm.get("kv_policy", "refresh") == "refresh",
                    arm["correct"],
                    block[threshold]["correct"],
                    tokens_per_forward=arm["tokens_per_forward"],
                    rows_per_token=arm["rows_per_token"],
                )
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--input", type=Path, required=True, help="of bench/accuracy_table.py")
    parser.add_argument("--output", type=Path, required=True, help="the calibration to write")
    arguments = parser.parse_args()
    convert(json.loads(arguments.input.read_text())).save(arguments.output)


if __name__ == "__main__":
    main()
