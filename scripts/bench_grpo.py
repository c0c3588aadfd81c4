"""A step of Reflection-GRPO beside PyTorch, on the shipped weights, in one run on one machine: stage 1, the Actor, stage 2, the
Editor, and both at once.

Both do the same work on the same numbers of rows. Stage 1: a group of edits is written for each picture, the distinct ones
are carried out with guidance, the Checker answers every claim about the pictures, and a LoRA on the VLM's decoder is updated
once. Stage 2: stochastic rollouts of a group of edits with guidance, their pictures, the Checker's answers, and one update of
a LoRA on the transformer over the window's steps. Both at once: a group of edits is written, each is carried out by stochastic
steps and judged, and both adapters are updated. PyTorch has diffusers' transformer and autoencoder, peft's LoRA, and
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
# Pictures of an update, and what configs/tabletop/grpo-{actor,editor,joint}.toml have.
PROBLEMS, STEPS, WINDOW, GUIDANCE = 2, 8, 2, 3.0
GROUP = {"actor": 16, "editor": 12, "joint": 8}
RANK = {"actor": 16, "editor": 32, "joint": 16}
# What has a LoRA, in the VLM's decoder and in the transformer.
DECODER = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
TRANSFORMER = "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out to_qkv_mlp_proj to_out"


def rlrig(stage):
    """Seconds of a step by its parts, the fastest of three, and the metrics of that step."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        keys = {
            "train.steps": 3,
            "train.batch": PROBLEMS,
            "train.micro_batch": PROBLEMS,
            "train.evaluate_every": 0,
            "train.patience": 0,
            "train.samples_every": 0,
            "train.checkpoint_every": 0,
            # PyTorch's Checker looks once as well, and nothing is drawn first.
            "models.looks": 1,
            f"{stage}.evaluation": 1,
        }
        stages = {
            "actor": {"actor.source": "render", "actor.pool": 0, "actor.tries": 1},
            "editor": {"editor.drawn": 0},
            "joint": {"actor.source": "render", "joint.rounds": 2},
        }
        poser, guided = ("editor" if stage == "editor" else "actor"), ("actor" if stage == "actor" else "editor")
        keys |= stages[stage] | {f"{poser}.{bound}_objects": 2 for bound in ("min", "max")}
        # PyTorch's edits are guided by the words alone.
        keys[f"{guided}.edit_guidance"] = "{ text = 3.0, image = 1.0 }"
        command = [ROOT / "target" / "release" / "rlrig", "train", "grpo", "--out", run]
        command += ["--config", ROOT / "configs" / "tabletop" / f"grpo-{stage}.toml"]
        command += [part for key, value in keys.items() for part in ("--set", f"{key}={value}")]
        environment = dict(os.environ, RAYON_NUM_THREADS=str(THREADS), CANDLE_NUM_THREADS="1")
        subprocess.run(list(map(str, command)), env=environment, check=True, capture_output=True)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = min((line for line in lines if "step_time" in line), key=lambda step: step["step_time"])
    parts = {name.removeprefix("time/"): seconds for name, seconds in best.items() if name.startswith("time/")}
    return parts | {"update": best["step_time"] - sum(parts.values())}, best


def trained(model, layers, rank):
    """The parameters of a new LoRA on these layers."""
    model.requires_grad_(False)
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    targets = [name for name in linear if name.endswith(tuple("." + layer for layer in layers.split()))]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets), model)
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


class Writing:
    """The Actor's edits, and its adapter."""

    def __init__(self, vlm, stage, measured):
        self.vlm, self.rows, self.asking = vlm, PROBLEMS * GROUP[stage], Asking(vlm)
        self.length = round(measured["completions/mean_length"])
        self.parameters = trained(vlm.model.language_model, DECODER, RANK[stage])
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1.2e-3, weight_decay=1e-4)

    @torch.no_grad()
    def draw(self):
        question = "The picture should show: large red ball left of small blue cube\nWrong:\n- large red ball left of small blue "
        question += "cube (large red ball 70 40, small blue cube 30 45)\nWhat one edit makes it right? Answer in JSON with "
        question += '"reflection" (what is missing, too much or misplaced) and "edit".'
        sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        length = {"min_new_tokens": self.length, "max_new_tokens": self.length}
        self.ids = self.vlm.generate(**self.asking.given(question, self.rows), **length, **sampling)

    def update(self):
        advantages = torch.randn(self.rows, 1)
        logits = self.vlm(**self.asking.seen(self.ids), logits_to_keep=self.length + 1).logits[:, :-1]
        new = torch.log_softmax(logits.float(), -1).gather(-1, self.ids[:, -self.length :, None])[..., 0]
        ratio = (new - new.detach()).exp()
        torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2)).mean().backward()
        descend(self.parameters, self.optimizer)


class Steps:
    """The Editor's stochastic steps, and its adapter."""

    def __init__(self, pipeline, stage):
        self.transformer, self.rows = pipeline.transformer, PROBLEMS * GROUP[stage]
        self.editing = Editing(pipeline, self.rows)
        self.parameters = trained(pipeline.transformer, TRANSFORMER, RANK[stage])
        self.optimizer = torch.optim.AdamW(self.parameters, lr=3e-4, weight_decay=1e-4)

    @staticmethod
    def move(x, v, t, d):
        s = 0.9 * (t / (1 - min(t, 1 - 1 / STEPS))) ** 0.5
        mean = x * (1 + s**2 * d / (2 * t)) + v * (1 + s**2 * (1 - t) / (2 * t)) * d
        return mean, s * (-d) ** 0.5

    def draw(self):
        self.taken = []

        def step(i, x, v, t, after):
            if not 1 <= i < 1 + WINDOW:
                return x + (after - t) * v
            mean, std = self.move(x, v, t, after - t)
            now = mean + std * torch.randn_like(x)
            self.taken.append((x, now, t, after - t))
            return now

        self.editing.pictures(step)

    def update(self):
        advantages, editing = torch.randn(self.rows), self.editing
        for x, now, t, d in self.taken:
            with torch.no_grad():
                negative = velocity(self.transformer, x, editing.empty, editing.reference, t)
            v = velocity(self.transformer, x, editing.text, editing.reference, t)
            mean, std = self.move(x, GUIDANCE * v + (1 - GUIDANCE) * negative, t, d)
            new = -((now - mean) ** 2).mean((1, 2)) / (2 * std**2)
            ratio = (new - new.detach()).exp()
            loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - 1e-5, 1 + 1e-5)).mean()
            (loss / WINDOW).backward()
        descend(self.parameters, self.optimizer)


def actor(pipeline, vlm, measured, claims):
    """A function for each part of a step of stage 1."""
    writing = Writing(vlm, "actor", measured)
    editing = Editing(pipeline, round(measured["edits/distinct"] * PROBLEMS))
    return {"rollout": lambda: (writing.draw(), editing.pictures(), writing.asking.check(claims)), "update": writing.update}


def editor(pipeline, vlm, measured, claims):
    """A function for each part of a step of stage 2."""
    steps, asking = Steps(pipeline, "editor"), Asking(vlm)
    return {"rollout": steps.draw, "judge": lambda: asking.check(claims), "update": steps.update}


def joint(pipeline, vlm, measured, claims):
    """A function for each part of a step of both at once, in which a trajectory has one turn."""
    writing, steps = Writing(vlm, "joint", measured), Steps(pipeline, "joint")
    rollout = lambda: (writing.draw(), steps.draw(), writing.asking.check(claims))
    return {"rollout": rollout, "update": lambda: (writing.update(), steps.update())}


def main():
    torch.set_num_threads(THREADS)
    for stage, parts in (("actor", actor), ("editor", editor), ("joint", joint)):
        ours, measured = rlrig(stage)
        pipeline = Flux2KleinPipeline.from_pretrained(WEIGHTS, torch_dtype=torch.float32)
        vlm = Qwen3VLForConditionalGeneration.from_pretrained(WEIGHTS / "vlm", dtype=torch.float32).eval()
        theirs = dict.fromkeys(ours, float("inf"))
        claims = round(measured["claims"] * PROBLEMS)
        parts = parts(pipeline, vlm, measured, claims)
        for _ in range(3):
            for name, part in parts.items():
                start = time.perf_counter()
                part()
                theirs[name] = min(theirs[name], time.perf_counter() - start)
        print(f"{stage}: threads: {THREADS}; {PROBLEMS * GROUP[stage]} edits, {claims} claims\n")
        print("| part | rlrig | PyTorch | times as fast |\n|---|---|---|---|")
        for name, seconds in [*theirs.items(), ("whole step", sum(theirs.values()))]:
            mine = ours.get(name, sum(ours.values()))
            print(f"| {name} | {mine:.2f} s | {seconds:.2f} s | {seconds / mine:.2f} |")
        print(flush=True)


if __name__ == "__main__":
    main()
