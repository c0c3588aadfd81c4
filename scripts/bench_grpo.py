"""A step of Reflection-GRPO beside PyTorch, on the shipped weights, in one run on one machine: stage 1, the Actor, and stage 2,
the Editor.

Both do the same work on the same numbers of rows. Stage 1: a group of edits is written for each picture, the distinct ones
are carried out with guidance, the Checker answers every claim about the pictures, and a LoRA on the VLM's decoder is updated
once. Stage 2: stochastic rollouts of a group of edits with guidance, their pictures, the Checker's answers, and one update of
a LoRA on the transformer over the window's steps. PyTorch has diffusers' transformer and autoencoder, peft's LoRA, and
transformers' generation without a schema; the negative branch of guidance is evaluated without gradients in both. Prints
tables of seconds. Needs a built rlrig and the packages of scripts/requirements-fixtures.txt:

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
from peft import LoraConfig, inject_adapter_in_model
from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

ROOT = Path(__file__).parent.parent
WEIGHTS = ROOT / "weights" / "tabletop"
THREADS = int(sys.argv[1]) if len(sys.argv) > 1 else os.cpu_count()
# Pictures of an update, and what configs/tabletop/grpo-{actor,editor}.toml have.
PROBLEMS, STEPS, WINDOW, GUIDANCE = 2, 8, 2, 3.0
GROUP = {"actor": 16, "editor": 12}
RANK = {"actor": 16, "editor": 32}
LAYERS = {
    "actor": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
    "editor": "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out to_qkv_mlp_proj to_out",
}


def rlrig(stage):
    """Seconds of a step by its parts, the fastest of three, and the metrics of that step."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        keys = {
            "train.steps": 3,
            "train.batch": PROBLEMS,
            "train.micro_batch": PROBLEMS,
            "train.evaluate_every": 0,
            "train.samples_every": 0,
            "train.checkpoint_every": 0,
            # PyTorch's Checker looks once as well, and nothing is drawn first.
            "models.looks": 1,
            f"{stage}.evaluation": 1,
            f"{stage}.min_objects": 2,
            f"{stage}.max_objects": 2,
        }
        keys |= {"actor": {"actor.source": "render", "actor.pool": 0, "actor.tries": 1}, "editor": {"editor.drawn": 0}}[stage]
        command = [ROOT / "target" / "release" / "rlrig", "train", "grpo", "--out", run]
        command += ["--config", ROOT / "configs" / "tabletop" / f"grpo-{stage}.toml"]
        command += [part for key, value in keys.items() for part in ("--set", f"{key}={value}")]
        environment = dict(os.environ, RAYON_NUM_THREADS=str(THREADS), CANDLE_NUM_THREADS="1")
        subprocess.run(list(map(str, command)), env=environment, check=True, capture_output=True)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = min((line for line in lines if "step_time" in line), key=lambda step: step["step_time"])
    parts = {name.removeprefix("time/"): seconds for name, seconds in best.items() if name.startswith("time/")}
    return parts | {"update": best["step_time"] - sum(parts.values())}, best


def trained(model, stage):
    """The parameters of a new LoRA on the layers that the config names."""
    model.requires_grad_(False)
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    targets = [name for name in linear if name.endswith(tuple("." + layer for layer in LAYERS[stage].split()))]
    inject_adapter_in_model(LoraConfig(r=RANK[stage], lora_alpha=2 * RANK[stage], target_modules=targets), model)
    return [p for p in model.parameters() if p.requires_grad]


def descend(parameters, optimizer):
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def velocity(transformer, x, text, reference, t):
    positions = [[0, y, x, 0] for y in range(8) for x in range(8)] + [[10, y, x, 0] for y in range(8) for x in range(8)]
    image = torch.tensor(positions).expand(len(x), -1, -1)
    words = torch.tensor([[0, 0, 0, i] for i in range(text.shape[1])]).expand(len(x), -1, -1)
    given = {"encoder_hidden_states": text, "img_ids": image, "txt_ids": words, "guidance": None}
    timestep = torch.full((len(x),), float(t))
    return transformer(hidden_states=torch.cat([x, reference], 1), timestep=timestep, **given).sample[:, :64]


class Editing:
    """Edits of `rows` pictures by random words."""

    def __init__(self, pipeline, rows):
        embedding = json.loads((WEIGHTS / "text_encoder" / "config.json").read_text())["prompt_embedding"]
        width = pipeline.text_encoder.config.hidden_size * len(embedding["layers"])
        self.pipeline, self.rows, self.channels = pipeline, rows, pipeline.transformer.config.in_channels
        self.text = torch.randn(rows, embedding["max_length"], width)
        self.empty = torch.randn(1, embedding["max_length"], width).expand(rows, -1, -1)
        self.reference = torch.randn(rows, 64, self.channels)

    def guided(self, x, t):
        text, reference = torch.cat([self.text, self.empty]), torch.cat([self.reference, self.reference])
        v = velocity(self.pipeline.transformer, torch.cat([x, x]), text, reference, t)
        return GUIDANCE * v[: self.rows] + (1 - GUIDANCE) * v[self.rows :]

    @torch.no_grad()
    def pictures(self, step=lambda i, x, v, t, after: x + (after - t) * v):
        """The edited pictures; `step` goes from one noise level to the next."""
        sigmas = torch.linspace(1, 0, STEPS + 1)
        x = torch.randn(self.rows, 64, self.channels)
        for i, (t, after) in enumerate(zip(sigmas, sigmas[1:])):
            x = step(i, x, self.guided(x, t), t, after)
        latents = torch.nn.functional.pixel_shuffle(x.transpose(1, 2).reshape(self.rows, self.channels, 8, 8), 2)
        self.pipeline.vae.decode(latents)


class Asking:
    """Questions about random pictures."""

    def __init__(self, vlm):
        self.vlm, self.tokenizer = vlm, AutoTokenizer.from_pretrained(WEIGHTS / "vlm")

    def given(self, question, rows):
        tokenizer, image = self.tokenizer, self.vlm.config.image_token_id
        head = [*tokenizer("<|im_start|>user\n<|vision_start|>").input_ids, *[image] * 64]
        end = "<|im_end|>\n<|im_start|>assistant\n"
        ids = torch.tensor([head + tokenizer("<|vision_end|>" + question + end).input_ids]).expand(rows, -1)
        return self.seen(ids)

    def seen(self, ids):
        rows = len(ids)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == self.vlm.config.image_token_id).int(),
            "pixel_values": torch.randn(rows * 256, 3 * 2 * 8 * 8),
            "image_grid_thw": torch.tensor([[1, 16, 16]] * rows),
        }

    @torch.no_grad()
    def check(self, claims):
        question = 'Does the picture show "large red ball left of small blue cube"? Answer in JSON with "reflection" (what is '
        question += 'seen of it, and where: x and y in percent) and "verdict" (yes or no).'
        for start in range(0, claims, 64):
            self.vlm.generate(**self.given(question, min(64, claims - start)), max_new_tokens=30, do_sample=False)


def actor(pipeline, vlm, measured):
    """A function for each part of a step of stage 1."""
    rows, length = PROBLEMS * GROUP["actor"], round(measured["completions/mean_length"])
    parameters, asking = trained(vlm.model.language_model, "actor"), Asking(vlm)
    optimizer = torch.optim.AdamW(parameters, lr=1.2e-3, weight_decay=1e-4)
    editing = Editing(pipeline, round(measured["edits/distinct"] * PROBLEMS))
    question = 'The picture should show: large red ball left of small blue cube\nWrong:\n- large red ball left of small blue '
    question += 'cube (large red ball 70 40, small blue cube 30 45)\nWhat one edit makes it right? Answer in JSON with '
    question += '"reflection" (what is missing, too much or misplaced) and "edit".'
    taken = []

    @torch.no_grad()
    def rollout():
        given = asking.given(question, rows)
        sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        taken[:] = [vlm.generate(**given, min_new_tokens=length, max_new_tokens=length, **sampling)]
        editing.pictures()
        asking.check(round(measured["claims"] * PROBLEMS))

    def update():
        ids, advantages = taken[0], torch.randn(rows)
        logits = vlm(**asking.seen(ids), logits_to_keep=length + 1).logits[:, :-1]
        new = torch.log_softmax(logits.float(), -1).gather(-1, ids[:, -length:, None])[..., 0]
        ratio = (new - new.detach()).exp()
        a = advantages[:, None]
        torch.maximum(-a * ratio, -a * ratio.clamp(0.8, 1.2)).mean().backward()
        descend(parameters, optimizer)

    return {"rollout": rollout, "update": update}


def editor(pipeline, vlm, measured):
    """A function for each part of a step of stage 2."""
    rows, transformer = PROBLEMS * GROUP["editor"], pipeline.transformer
    parameters, editing, asking = trained(transformer, "editor"), Editing(pipeline, rows), Asking(vlm)
    optimizer = torch.optim.AdamW(parameters, lr=3e-4, weight_decay=1e-4)
    taken = []

    def move(x, v, t, d):
        s = 0.9 * (t / (1 - min(t, 1 - 1 / STEPS))) ** 0.5
        mean = x * (1 + s**2 * d / (2 * t)) + v * (1 + s**2 * (1 - t) / (2 * t)) * d
        return mean, s * (-d) ** 0.5

    def step(i, x, v, t, after):
        if not 1 <= i < 1 + WINDOW:
            return x + (after - t) * v
        mean, std = move(x, v, t, after - t)
        now = mean + std * torch.randn_like(x)
        taken.append((x, now, t, after - t))
        return now

    def rollout():
        taken.clear()
        editing.pictures(step)

    def judge():
        asking.check(round(measured["claims"] * PROBLEMS))

    def update():
        advantages = torch.randn(rows)
        for x, now, t, d in taken:
            with torch.no_grad():
                negative = velocity(transformer, x, editing.empty, editing.reference, t)
            v = GUIDANCE * velocity(transformer, x, editing.text, editing.reference, t) + (1 - GUIDANCE) * negative
            mean, std = move(x, v, t, d)
            new = -((now - mean) ** 2).mean((1, 2)) / (2 * std**2)
            ratio = (new - new.detach()).exp()
            loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - 1e-5, 1 + 1e-5)).mean()
            (loss / WINDOW).backward()
        descend(parameters, optimizer)

    return {"rollout": rollout, "judge": judge, "update": update}


def main():
    torch.set_num_threads(THREADS)
    for stage, parts in (("actor", actor), ("editor", editor)):
        ours, measured = rlrig(stage)
        pipeline = Flux2KleinPipeline.from_pretrained(WEIGHTS, torch_dtype=torch.float32)
        vlm = Qwen3VLForConditionalGeneration.from_pretrained(WEIGHTS / "vlm", dtype=torch.float32).eval()
        theirs = dict.fromkeys(ours, float("inf"))
        parts = parts(pipeline, vlm, measured)
        for _ in range(3):
            for name, part in parts.items():
                start = time.perf_counter()
                part()
                theirs[name] = min(theirs[name], time.perf_counter() - start)
        rows, claims = PROBLEMS * GROUP[stage], measured["claims"] * PROBLEMS
        print(f"{stage}: threads: {THREADS}; {rows} edits, {claims:.0f} claims\n")
        print("| part | rlrig | PyTorch | times as fast |\n|---|---|---|---|")
        for name, seconds in [*theirs.items(), ("whole step", sum(theirs.values()))]:
            mine = ours.get(name, sum(ours.values()))
            print(f"| {name} | {mine:.2f} s | {seconds:.2f} s | {seconds / mine:.2f} |")
        print(flush=True)


if __name__ == "__main__":
    main()
