"""rlrig beside PyTorch, diffusers and transformers on the shipped weights, in one run on one machine.

Prints a table: pictures from a prompt (one, and eight at once), decoding, a VLM's answer, a training step of the Diffuser.
PyTorch's training step is timed in f32 and in bf16 autocast, the faster one counts.

    python scripts/bench_models.py [THREADS]
"""

import os
import subprocess
import sys
import time

import torch
from diffusers import Flux2KleinPipeline
from torch_diffuser import PROMPT, ROOT, WEIGHTS, drawing, training
from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

THREADS = int(sys.argv[1]) if len(sys.argv) > 1 else os.cpu_count()
BATCH, TOKENS = 8, 24
TRAIN, TEXT = 32, 40


def best(tries, work):
    seconds = float("inf")
    for _ in range(tries):
        start = time.perf_counter()
        work()
        seconds = min(seconds, time.perf_counter() - start)
    return seconds


def rlrig():
    environment = dict(os.environ, RAYON_NUM_THREADS=str(THREADS), CANDLE_NUM_THREADS="1")
    command = ["cargo", "bench", "--quiet", "--bench", "models"]
    out = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout
    return {name: float(seconds) for name, seconds in (line.split(": ") for line in out.splitlines() if ": " in line)}


def decode(pipeline):
    channels = pipeline.vae.config.latent_channels
    latents = torch.randn(BATCH, channels, 16, 16)
    return best(5, lambda: pipeline.vae.decode(latents))


def answer():
    folder = WEIGHTS / "vlm"
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    patches = torch.randn(256, 3 * 2 * 8 * 8)
    ids = [*tokenizer("<|vision_start|>").input_ids, *[model.config.image_token_id] * 64]
    ids = torch.tensor([ids + tokenizer("<|vision_end|>" + PROMPT + "<|im_end|><|im_start|>").input_ids])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": patches,
        "image_grid_thw": torch.tensor([[1, 16, 16]]),
        "mm_token_type_ids": (ids == model.config.image_token_id).int(),
    }
    length = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
    return best(5, lambda: model.generate(**inputs, **length))


def main():
    torch.set_num_threads(THREADS)
    ours = rlrig()
    pipeline = Flux2KleinPipeline.from_pretrained(WEIGHTS, torch_dtype=torch.float32)
    with torch.no_grad():
        theirs = {
            "generate 1": best(3, drawing(pipeline, 1)),
            "generate 8": best(3, drawing(pipeline, BATCH)),
            "decode 8": decode(pipeline),
            "answer 24": answer(),
        }
    dtypes = (torch.float32, torch.bfloat16)
    theirs["train 32"] = min(best(5, training(pipeline, dtype, TRAIN, TEXT)) for dtype in dtypes)
    print(f"threads: {THREADS}\n\n| work | rlrig | PyTorch | times as fast |\n|---|---|---|---|")
    for name, seconds in theirs.items():
        print(f"| {name} | {ours[name] * 1e3:.1f} ms | {seconds * 1e3:.1f} ms | {seconds / ours[name]:.2f} |")


if __name__ == "__main__":
    main()
