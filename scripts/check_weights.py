"""Opens the shipped weights in diffusers and transformers and compares them with rlrig.

The same picture from the same noise (mean absolute difference at most 1/255), and the same probability that a claim about
it holds. Needs a built rlrig and the packages of scripts/requirements-fixtures.txt:

    cargo build --release && python scripts/check_weights.py [FOLDER]
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import Flux2KleinPipeline
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
FOLDER = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "weights" / "tabletop"
PROMPT = "a small red ball to the left of a large blue cube"
STEPS, GUIDANCE = 12, 3.0


def rlrig(*arguments):
    command = [ROOT / "target" / "release" / "rlrig", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def picture(folder):
    """The picture of diffusers beside that of rlrig."""
    out, noise = folder / "rlrig.png", folder / "noise.safetensors"
    rlrig(
        *["generate", "-q", "--device", "cpu", "--dtype", "f32", "--model", FOLDER, "--vlm", FOLDER / "vlm"],
        *["--prompt", PROMPT, "--seed", 7, "--rounds", 1, "--steps", STEPS, "--guidance", GUIDANCE],
        *["--out", out, "--save-noise", noise],
    )
    pipeline = Flux2KleinPipeline.from_pretrained(FOLDER, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    embedding = json.loads((FOLDER / "text_encoder" / "config.json").read_text())["prompt_embedding"]
    latents = load_file(noise)["noise"]
    theirs = pipeline(
        prompt=PROMPT,
        height=128,
        width=128,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        latents=latents if latents.ndim == 4 else latents[None],
        max_sequence_length=embedding["max_length"],
        text_encoder_out_layers=tuple(embedding["layers"]),
    ).images[0]
    theirs.save(folder / "diffusers.png")
    difference = np.abs(np.asarray(Image.open(out), dtype=float) - np.asarray(theirs, dtype=float)).mean()
    print(f"mean absolute difference of the pictures: {difference:.4f} of 255 (at most 1)")
    assert difference <= 1, "rlrig and diffusers draw different pictures"


def main():
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        picture(Path(folder))
    print("the shipped weights are those of a Flux2KleinPipeline")


if __name__ == "__main__":
    main()
