"""The job array of docs/clusters.md, typed where `sbatch` and `dwm-fast` only say what they were asked."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "clusters.md"
LISTED = (
    "done source-photo-seed0 -",
    "ready mask-edit-photo-seed0 source-photo-seed0",
    "ready mask-binary-photo-seed0 source-photo-seed0",
    "waiting tune-photo-art-edit-S_end-seed0 source-photo-seed0,mask-edit-photo-seed0",
)
DWM_FAST = r"""#!/bin/bash
case "$*" in *--list-stages) printf '%s\t%s\t%s\n' {listed} ;; *) echo "${{@: -2}}" >>{told} ;; esac
"""
SBATCH = r"""#!/bin/bash
last=1
for word; do
    case "$word" in --array=1-*) last=${{word#--array=1-}} ;; --dependency=*) echo "$word" >>{told} ;; esac
done
for ((SLURM_ARRAY_TASK_ID = 1; SLURM_ARRAY_TASK_ID <= last; SLURM_ARRAY_TASK_ID++)); do
    export SLURM_ARRAY_TASK_ID; bash -c "${{@: -1}}"
done
echo $((100 + last))
"""


def test_the_job_array_does_each_unfinished_stage_after_those_it_needs_and_collects(tmp_path: Path) -> None:
    (script,) = re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    told = tmp_path / "told"
    for name, text in (("dwm-fast", DWM_FAST), ("sbatch", SBATCH)):
        program = tmp_path / name
        program.write_text(text.format(listed=" ".join(LISTED), told=told))
        program.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    subprocess.run(["bash", "-eu", "-c", script], cwd=tmp_path, env={**os.environ, "PATH": path}, check=True)
    assert told.read_text().splitlines() == [
        "--stage mask-edit-photo-seed0",
        "--stage mask-binary-photo-seed0",
        "--dependency=afterany:102",
        "--stage tune-photo-art-edit-S_end-seed0",
        "--dependency=afterany:101",
        "runs/pacs --collect",
    ]
