"""rlrig beside PyTorch, diffusers and transformers on the shipped weights, in one run on one machine.

Prints a table: pictures from a prompt (one, and eight at once), decoding, a VLM's answer, a training step of the Diffuser.
PyTorch's training step is timed in f32 and in bf16 autocast, the faster one counts.

    python scripts/bench_models.py [THREADS]
"""

import copy
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from diffusers import Flux2KleinPipeline
from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

ROOT = Path(__file__).parent.parent
WEIGHTS = ROOT / "weights" / "tabletop"
THREADS = int(sys.argv[1]) if len(sys.argv) > 1 else os.cpu_count()
PROMPT = "a small red ball to the left of a large blue cube"
STEPS, GUIDANCE, BATCH, TOKENS = 20, 3.0, 8, 24
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


def pictures(pipeline, count):
    import json

    embedding = json.loads((WEIGHTS / "text_encoder" / "config.json").read_text())["prompt_embedding"]

    def work():
        pipeline(
            prompt=[PROMPT] * count,
            height=128,
            width=128,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            max_sequence_length=embedding["max_length"],
            text_encoder_out_layers=tuple(embedding["layers"]),
        )

    return best(3, work)


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


def train(pipeline, dtype):
    transformer, text = copy.deepcopy(pipeline.transformer).train(), copy.deepcopy(pipeline.text_encoder).train()
    for module in (transformer, text):
        module.requires_grad_(True)
    named = [*transformer.named_parameters(), *text.named_parameters()]
    outer = ("embed", "lm_head", "proj_out")
    matrices = [p for n, p in named if p.ndim == 2 and not any(o in n for o in outer)]
    others = [p for n, p in named if not (p.ndim == 2 and not any(o in n for o in outer))]
    optimizers = [torch.optim.Muon(matrices, lr=1e-4), torch.optim.AdamW(others, lr=1e-4)]
    layers = text.config.num_hidden_layers
    ids = torch.randint(0, text.config.vocab_size, (TRAIN, TEXT))
    image = torch.rand(TRAIN, 3, 128, 128)
    positions = torch.tensor([[0, y, x, 0] for y in range(8) for x in range(8)]).expand(TRAIN, -1, -1)
    words = torch.tensor([[0, 0, 0, i] for i in range(TEXT)]).expand(TRAIN, -1, -1)

    def work():
        with torch.no_grad():
            latents = pipeline.vae.encode(image).latent_dist.mode()
            latents = torch.nn.functional.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)
        noise, t = torch.randn_like(latents), torch.rand(TRAIN)
        x = torch.lerp(latents, noise, t[:, None, None])
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            states = text.model(ids, output_hidden_states=True).hidden_states
            states = torch.cat([states[i] for i in range(1, layers + 1)], -1)
            given = {"encoder_hidden_states": states, "img_ids": positions, "txt_ids": words, "guidance": None}
            velocity = transformer(hidden_states=x, timestep=t, **given).sample
        ((velocity.float() - (noise - latents)) ** 2).mean().backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return best(5, work)


def main():
    torch.set_num_threads(THREADS)
    ours = rlrig()
    pipeline = Flux2KleinPipeline.from_pretrained(WEIGHTS, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        theirs = {
            "generate 1": pictures(pipeline, 1),
            "generate 8": pictures(pipeline, BATCH),
            "decode 8": decode(pipeline),
            "answer 24": answer(),
        }
    theirs["train 32"] = min(train(pipeline, torch.float32), train(pipeline, torch.bfloat16))
    print(f"threads: {THREADS}\n\n| work | rlrig | PyTorch | times as fast |\n|---|---|---|---|")
    for name, seconds in theirs.items():
        print(f"| {name} | {ours[name] * 1e3:.1f} ms | {seconds * 1e3:.1f} ms | {seconds / ours[name]:.2f} |")


if __name__ == "__main__":
    main()
