"""The numbers that the README tells of the built-in models, from the folder of an evaluation of prompts of the test split:

    rlrig eval --suite --limit 500 --out eval-tabletop/ && python scripts/readme_numbers.py eval-tabletop/

Means with 95% intervals are those of results.json; shares of prompts have Wilson's. Needs Python alone.
"""

import collections
import json
import math
import sys
from pathlib import Path

DEPTH = {"in front of", "behind"}


def wilson(good, n):
    """A share with its 95% interval."""
    p, z = good / max(n, 1), 1.959964
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)
    return f"{p:.2f} ({low:.2f} to {high:.2f}; {good} of {n})"


def told(estimate):
    return f"{estimate['mean']:.3f} ({estimate['lo']:.3f} to {estimate['hi']:.3f})"


def kind(line):
    """What is hard in a prompt: depth, else a thing in a ring, else directions alone."""
    said = set(line["reference"]["predicates"])
    return "depth" if said & DEPTH else "inside" if "inside" in said else "directions"


def main(folder):
    results = json.loads((folder / "results.json").read_text())
    lines = [json.loads(line) for line in (folder / "samples.jsonl").open()]
    print("config", {k: results["config"][k] for k in ("split", "limit", "seed", "rounds", "draws")})
    for mode, found in results["modes"].items():
        print(f"\n## {mode}")
        for name in ("sg_iou", "oracle_sg_iou", "oracle_perfect", "no_others", "oracle_objects", "oracle_mean"):
            print(f"  {name}: {told(found['metrics'][name])}")
        for name, cost in found["cost"].items():
            print(f"  {name}: {told(cost)}")
        for split, metrics in found["by_split"].items():
            print(f"  {split}: all right {told(metrics['oracle_perfect'])}, SG-IoU {told(metrics['oracle_sg_iou'])}")
        for count, metrics in found["by_objects"].items():
            print(f"  {count} objects: {told(metrics['oracle_perfect'])}, n {metrics['oracle_perfect']['n']}")
        for name, share in found["edits"].items():
            print(f"  edits {name}: {told(share)}, n {share['n']}")

        prompts = collections.defaultdict(list)
        for line in lines:
            if line["mode"] == mode:
                prompts[line["split"], line["id"], line["seed"]].append(line)
        shares = collections.defaultdict(lambda: [0, 0])
        for turns in prompts.values():
            result = next(turn for turn in turns if turn["rounds"] in turn["result_after"])
            right = result["metrics"]["oracle_perfect"] == 1
            accepted = all(claim["checker"] >= results["config"]["accept"] for claim in result["claims"])
            some = any(turn["metrics"]["oracle_perfect"] == 1 for turn in turns)
            for name, counts in (
                (f"all right, {kind(result)}", right),
                (f"some picture right, {kind(result)}", some),
                ("some picture right", some),
                ("accepted", accepted),
                (f"right if {'accepted' if accepted else 'spent'}", right),
            ):
                shares[name][0] += counts
                shares[name][1] += 1
        for name, (good, n) in sorted(shares.items()):
            print(f"  {name}: {wilson(good, n)}")
    print("\n## the Checker against the oracle, over all pictures")
    for name, found in results["agreement"].items():
        kappa = told(found["kappa"]) if found["kappa"] else "none"
        print(f"  {name}: {told(found['accuracy'])}, kappa {kappa}, ECE {told(found['calibration_error'])}, {found['claims']}")


if len(sys.argv) != 2:
    sys.exit("usage: python scripts/readme_numbers.py FOLDER")
main(Path(sys.argv[1]))
