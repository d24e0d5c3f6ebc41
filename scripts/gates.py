"""Golden gates: what mergekit-moe makes of the recipes in tests/golden/gates.

usage (from the repository root): python scripts/gates.py MERGEKIT-MOE [CASE ...]

For each CASE.yml runs mergekit-moe with --random-seed 42 and keeps the gates alone: CASE.safetensors with `gate.<layer>` [E, D] and, with a
shared expert, `shared_gate.<layer>` [1, D], in the recipe's dtype. Needs mergekit 0.1.5 (which needs transformers 5).
"""

import pathlib
import re
import subprocess
import sys
import tempfile

from safetensors import safe_open
from safetensors.torch import save_file

GOLDEN = pathlib.Path("tests/golden/gates")


def main(mergekit, cases):
    for recipe in sorted(GOLDEN.glob("*.yml")):
        if cases and recipe.stem not in cases:
            continue
        gates = {}
        with tempfile.TemporaryDirectory() as out:
            subprocess.run([mergekit, recipe, out, "--random-seed", "42"], check=True)
            for file in pathlib.Path(out).glob("*.safetensors"):
                with safe_open(file, "pt") as tensors:
                    for name in tensors.keys():
                        found = re.fullmatch(r"model\.layers\.(\d+)\.(?:mlp|block_sparse_moe)\.(gate|shared_expert_gate)\.weight", name)
                        if found:
                            kind = "gate" if found[2] == "gate" else "shared_gate"
                            gates[f"{kind}.{found[1]}"] = tensors.get_tensor(name)
        save_file(gates, recipe.with_suffix(".safetensors"))
        print(recipe.stem, len(gates), "gates")


main(sys.argv[1], sys.argv[2:])
