"""A step of Reflection-GRPO (stage 2, the Editor) beside PyTorch, on the shipped weights, in one run on one machine.

Both do the same work on the same numbers of rows: stochastic rollouts of a group of edits with guidance, their pictures,
the Checker's answers about every claim, and one update of a LoRA over the window's steps. PyTorch has diffusers'
transformer and autoencoder, peft's LoRA, and transformers' greedy generation without a schema; the negative branch of
guidance is evaluated without gradients in both. Prints a table of seconds. Needs a built rlrig and the packages of
scripts/requirements-fixtures.txt:

    cargo build --release && python scripts/bench_grpo.py [THREADS]
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from diffusers import Flux2KleinPipeline
from peft import LoraConfig
from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

ROOT = Path(__file__).parent.parent
WEIGHTS = ROOT / "weights" / "tabletop"
THREADS = int(sys.argv[1]) if len(sys.argv) > 1 else os.cpu_count()
# Edits of an update, the size of their groups, and what configs/tabletop/grpo-editor.toml has.
PROBLEMS, GROUP, STEPS, WINDOW, GUIDANCE, RANK = 2, 12, 8, 2, 3.0, 32
LAYERS = "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out to_qkv_mlp_proj to_out"
ROWS = PROBLEMS * GROUP


def rlrig():
    """Seconds of a step by its stages, the fastest of three, and how many claims were checked in a step."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        keys = {
            "train.steps": 3,
            "train.batch": PROBLEMS,
            "train.micro_batch": PROBLEMS,
            "train.evaluate_every": 0,
            "train.samples_every": 0,
            "train.checkpoint_every": 0,
            "editor.drawn": 0,
            "editor.evaluation": 1,
            "editor.min_objects": 2,
            "editor.max_objects": 2,
            "group.size": GROUP,
            # PyTorch's Checker looks once as well.
            "models.looks": 1,
        }
        command = [ROOT / "target" / "release" / "rlrig", "train", "grpo", "--out", run]
        command += ["--config", ROOT / "configs" / "tabletop" / "grpo-editor.toml"]
        command += [part for key, value in keys.items() for part in ("--set", f"{key}={value}")]
        environment = dict(os.environ, RAYON_NUM_THREADS=str(THREADS), CANDLE_NUM_THREADS="1")
        subprocess.run(list(map(str, command)), env=environment, check=True, capture_output=True)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "step_time" in line]
    best = min(steps, key=lambda step: step["step_time"])
    stages = {name: best[f"time/{name}"] for name in ("rollout", "judge")}
    return stages | {"update": best["step_time"] - sum(stages.values())}, best["claims"] * PROBLEMS


def velocity(transformer, x, text, reference, t):
    positions = [[0, y, x, 0] for y in range(8) for x in range(8)] + [[10, y, x, 0] for y in range(8) for x in range(8)]
    image = torch.tensor(positions).expand(len(x), -1, -1)
    words = torch.tensor([[0, 0, 0, i] for i in range(text.shape[1])]).expand(len(x), -1, -1)
    given = {"encoder_hidden_states": text, "img_ids": image, "txt_ids": words, "guidance": None}
    timestep = torch.full((len(x),), float(t))
    return transformer(hidden_states=torch.cat([x, reference], 1), timestep=timestep, **given).sample[:, :64]


def step(pipeline, vlm, claims):
    """A function for each stage."""
    embedding = json.loads((WEIGHTS / "text_encoder" / "config.json").read_text())["prompt_embedding"]
    transformer, length = pipeline.transformer, embedding["max_length"]
    width = pipeline.text_encoder.config.hidden_size * len(embedding["layers"])
    transformer.requires_grad_(False)
    linear = [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    targets = [name for name in linear if name.endswith(tuple("." + layer for layer in LAYERS.split()))]
    transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets))
    trained = [p for p in transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-4, weight_decay=1e-4)
    channels = transformer.config.in_channels
    text, empty = torch.randn(ROWS, length, width), torch.randn(1, length, width).expand(ROWS, -1, -1)
    reference, sigmas = torch.randn(ROWS, 64, channels), torch.linspace(1, 0, STEPS + 1)
    taken = []

    def both(x, t):
        v = velocity(transformer, torch.cat([x, x]), torch.cat([text, empty]), torch.cat([reference, reference]), t)
        return GUIDANCE * v[:ROWS] + (1 - GUIDANCE) * v[ROWS:]

    def move(x, v, t, d):
        s = 0.9 * (t / (1 - min(t, sigmas[1]))) ** 0.5
        mean = x * (1 + s**2 * d / (2 * t)) + v * (1 + s**2 * (1 - t) / (2 * t)) * d
        return mean, s * (-d) ** 0.5

    @torch.no_grad()
    def rollout():
        taken.clear()
        x = torch.randn(ROWS, 64, channels)
        for i, (t, after) in enumerate(zip(sigmas, sigmas[1:])):
            v = both(x, t)
            if 1 <= i < 1 + WINDOW:
                mean, std = move(x, v, t, after - t)
                now = mean + std * torch.randn_like(x)
                taken.append((x, now, t, after - t))
                x = now
            else:
                x = x + (after - t) * v
        latents = torch.nn.functional.pixel_shuffle(x.transpose(1, 2).reshape(ROWS, channels, 8, 8), 2)
        pipeline.vae.decode(latents)

    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS / "vlm")
    head = [*tokenizer("<|im_start|>user\n<|vision_start|>").input_ids, *[vlm.config.image_token_id] * 64]
    claim = 'Does the picture show "large red ball left of small blue cube"? Answer in JSON with "reflection" (what is seen '
    claim += 'of it, and where: x and y in percent) and "verdict" (yes or no).<|im_end|>\n<|im_start|>assistant\n'
    ids = torch.tensor([head + tokenizer("<|vision_end|>" + claim).input_ids])

    @torch.no_grad()
    def judge():
        left = claims
        while left > 0:
            rows, left = min(left, 64), left - 64
            many = ids.expand(rows, -1)
            vlm.generate(
                input_ids=many,
                attention_mask=torch.ones_like(many),
                mm_token_type_ids=(many == vlm.config.image_token_id).int(),
                pixel_values=torch.randn(rows * 256, 3 * 2 * 8 * 8),
                image_grid_thw=torch.tensor([[1, 16, 16]] * rows),
                max_new_tokens=30,
                do_sample=False,
            )

    def update():
        advantages = torch.randn(ROWS)
        for x, now, t, d in taken:
            with torch.no_grad():
                negative = velocity(transformer, x, empty, reference, t)
            v = GUIDANCE * velocity(transformer, x, text, reference, t) + (1 - GUIDANCE) * negative
            mean, std = move(x, v, t, d)
            new = -((now - mean) ** 2).mean((1, 2)) / (2 * std**2)
            ratio = (new - new.detach()).exp()
            loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - 1e-5, 1 + 1e-5)).mean()
            (loss / WINDOW).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return {"rollout": rollout, "judge": judge, "update": update}


def main():
    torch.set_num_threads(THREADS)
    ours, claims = rlrig()
    pipeline = Flux2KleinPipeline.from_pretrained(WEIGHTS, torch_dtype=torch.float32)
    vlm = Qwen3VLForConditionalGeneration.from_pretrained(WEIGHTS / "vlm", dtype=torch.float32).eval()
    stages = step(pipeline, vlm, round(claims))
    theirs = dict.fromkeys(ours, float("inf"))
    for _ in range(3):
        for name, stage in stages.items():
            start = time.perf_counter()
            stage()
            theirs[name] = min(theirs[name], time.perf_counter() - start)
    print(f"threads: {THREADS}; {ROWS} edits, {claims:.0f} claims\n\n| stage | rlrig | PyTorch | times as fast |")
    print("|---|---|---|---|")
    for name, seconds in [*theirs.items(), ("whole step", sum(theirs.values()))]:
        mine = ours.get(name, sum(ours.values()))
        print(f"| {name} | {mine:.2f} s | {seconds:.2f} s | {seconds / mine:.2f} |")


if __name__ == "__main__":
    main()
