"""rlrig beside PyTorch, diffusers and transformers on one NVIDIA GPU, with the same weights or the same shapes.

Prints tables: (a) the shipped models: pictures and training steps a second; (b) FLUX.2-klein-4B's shape at 1024x1024:
milliseconds a step, peak memory and the share of the measured bf16 matrix peak, beside diffusers eager and compiled, and
where a step of rlrig's goes; (c) Qwen3-VL-4B's shape: prefill and tokens a second. A part takes a few minutes.

    python scripts/bench_gpu.py {tabletop,klein,vlm,all} [--bench PROGRAM] [--no-compile]

PROGRAM is the bench target `gpu` built before, where there is no cargo (`cargo bench --no-run --features cuda --bench gpu`
names it). It needs a driver, and CUDA 13's libraries: those of PyTorch's wheels are found.
"""

import argparse
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from torch_diffuser import ROOT, WEIGHTS, drawing, training

# Those of benches/gpu.rs too.
PICTURES, TRAINED, DENOISING, DECODED = 64, 256, 8, 64
TEXT, SIDE, LENGTH = 48, 64, 512
GIB = 2**30


def best(tries, work):
    """The best seconds of some tries, one more to warm up."""
    seconds = float("inf")
    for _ in range(tries + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        seconds = min(seconds, time.perf_counter() - start)
    return seconds


def matrix_peak():
    """Operations a second of a large bf16 matrix product."""
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / best(10, lambda: a @ b)


class Memory:
    """The most memory of the device that was used since the beginning, by whomever."""

    def __enter__(self):
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        self.before, self.most, self.on = total - free, 0, True
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while self.on:
            free, total = torch.cuda.mem_get_info()
            self.most = max(self.most, total - free - self.before)
            time.sleep(0.02)

    def __exit__(self, *_):
        self.on = False
        self.thread.join()


def libraries():
    """Folders of the CUDA libraries in PyTorch's wheels."""
    folders = {str(path.parent) for site in sys.path for path in Path(site or ".").glob("nvidia/**/lib*/*.so*")}
    return ":".join(sorted(folders) + [os.environ.get("LD_LIBRARY_PATH", "")])


def rlrig(part, program):
    """What the bench target says: numbers by their names. And the most memory it took."""
    cargo = ["cargo", "bench", "--quiet", "--features", "cuda", "--bench", "gpu", "--"]
    command = ([program] if program else cargo) + [part]
    environment = dict(os.environ, LD_LIBRARY_PATH=libraries())
    with Memory() as memory:
        out = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    lines = (line.rsplit(": ", 1) for line in out.splitlines() if ": " in line)
    return {name: float(number) for name, number in lines}, memory.most


def table(*rows):
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows[1:]:
        print("| " + " | ".join(row) + " |")
    print(flush=True)


def pipeline_on_gpu(dtype):
    from diffusers import Flux2KleinPipeline

    return Flux2KleinPipeline.from_pretrained(WEIGHTS, torch_dtype=dtype).to("cuda")


def pictures(dtype):
    return best(3, drawing(pipeline_on_gpu(dtype), PICTURES)) / PICTURES


def pretraining(dtype):
    return best(5, training(pipeline_on_gpu(torch.float32), dtype, TRAINED, TEXT, fused=True))


def tabletop(arguments):
    ours, memory = rlrig("tabletop", arguments.bench)
    rows = [("shipped models", "rlrig", "PyTorch eager", "times as fast")]
    for name, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
        theirs = pictures(dtype)
        mine = ours[f"pictures {name}"]
        rows.append((f"pictures a second, {PICTURES} at once, {name}", f"{1 / mine:.1f}", f"{1 / theirs:.1f}", f"{theirs / mine:.2f}"))
    for name, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
        theirs = pretraining(dtype)
        mine = ours[f"pretraining {name}"]
        rows.append((f"pretraining steps a second, batch {TRAINED}, {name}", f"{1 / mine:.2f}", f"{1 / theirs:.2f}", f"{theirs / mine:.2f}"))
    for learner in ("editor", "actor"):
        rows.append((f"GRPO steps a second, {learner}", f"{1 / ours[f'grpo {learner}']:.3f}", "", ""))
    table(*rows)
    print(f"rlrig took {memory / GIB:.1f} GiB at most\n")


def klein(arguments):
    from diffusers import Flux2Transformer2DModel

    peak = matrix_peak()
    print(f"measured bf16 matrix peak: {peak / 1e12:.0f} TFLOP/s\n")
    ours, memory = rlrig("klein", arguments.bench)
    dim, blocks, tokens = 24 * 128, 25, SIDE * SIDE + LENGTH
    # A block's products have 13 dim^2 weights for each token, a picture's and a text's their own in the double-stream ones, which
    # feed-forward layers three times as wide make; attention is two products of all tokens with all.
    work = blocks * (2 * 13 * dim**2 * tokens + 4 * tokens**2 * dim)

    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = Flux2Transformer2DModel(
            num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False
        ).eval()
        torch.set_default_dtype(torch.float32)

    def theirs(model, batch):
        x = torch.randn(batch, SIDE * SIDE, 128, device="cuda")
        text = torch.randn(batch, LENGTH, 7680, device="cuda", dtype=torch.bfloat16)
        places = torch.tensor([[0, y, x, 0] for y in range(SIDE) for x in range(SIDE)], device="cuda")
        words = torch.tensor([[0, 0, 0, i] for i in range(LENGTH)], device="cuda")
        given = {"encoder_hidden_states": text, "img_ids": places.expand(batch, -1, -1), "guidance": None}

        @torch.no_grad()
        def run():
            state = x
            for i in range(DENOISING):
                t = torch.full((batch,), 1 - i / DENOISING, device="cuda", dtype=torch.bfloat16)
                v = model(hidden_states=state.bfloat16(), timestep=t, txt_ids=words.expand(batch, -1, -1), **given)
                state = state - v.sample.float() / DENOISING

        torch.cuda.reset_peak_memory_stats()
        return best(2, run) / DENOISING, torch.cuda.max_memory_allocated()

    rows = [("FLUX.2-klein-4B's shape, 1024x1024, bf16", "ms a step", "peak memory, GiB", "share of the peak")]
    for batch in (1, 4):
        for name in ("rlrig", "diffusers eager") if arguments.no_compile else ("rlrig", "diffusers eager", "torch.compile"):
            if name == "rlrig":
                seconds, most = ours[f"step {batch}"], memory
            else:
                seconds, most = theirs(torch.compile(model) if name == "torch.compile" else model, batch)
            share = f"{batch * work / seconds / peak:.0%}"
            rows.append((f"batch {batch}, {name}", f"{seconds * 1e3:.1f}", f"{most / GIB:.1f}", share))
    table(*rows)
    print("rlrig's memory is of both batches in one process.\n")

    del model
    torch.cuda.empty_cache()
    parts, _ = rlrig("profile", arguments.bench)
    # "of which" is a part of the line before it.
    whole = sum(seconds for name, seconds in parts.items() if "of which" not in name)
    rows = [("where a step of rlrig's goes, batch 1", "ms", "share")]
    rows += [(name, f"{seconds * 1e3:.2f}", f"{seconds / whole:.0%}") for name, seconds in parts.items()]
    table(*rows)


def vlm(arguments):
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    ours, memory = rlrig("vlm", arguments.bench)
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": 151936,
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rope_parameters": {"rope_theta": 5e6, "rope_type": "default", "mrope_section": [24, 20, 20]},
        },
        vision_config={
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_heads": 16,
            "out_hidden_size": 2560,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [5, 11, 17],
        },
        image_token_id=5,
        video_token_id=6,
        vision_start_token_id=7,
        vision_end_token_id=8,
        tie_word_embeddings=True,
    )
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = Qwen3VLForConditionalGeneration(config).eval()
        torch.set_default_dtype(torch.float32)
    seen = SIDE * SIDE // 4
    ids = torch.tensor([[7, *[5] * seen, 8, *range(10, 74)]], device="cuda")
    given = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(SIDE * SIDE, 3 * 2 * 16 * 16, device="cuda", dtype=torch.bfloat16),
        "image_grid_thw": torch.tensor([[1, SIDE, SIDE]], device="cuda"),
        "mm_token_type_ids": (ids == 5).int(),
    }
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        tower = best(2, lambda: model.model.visual(given["pixel_values"], given["image_grid_thw"]))
        first, many = (
            best(2, lambda n=n: model.generate(**given, max_new_tokens=n, min_new_tokens=n, do_sample=False))
            for n in (1, DECODED + 1)
        )
    most = torch.cuda.max_memory_allocated()
    prefill, token = first - tower, (many - first) / DECODED
    table(
        (f"Qwen3-VL-4B's shape, bf16, one picture of {SIDE * 16}x{SIDE * 16}", "rlrig", "transformers", "times as fast"),
        ("vision tower, ms", f"{ours['tower'] * 1e3:.1f}", f"{tower * 1e3:.1f}", f"{tower / ours['tower']:.2f}"),
        (f"prefill of {ids.shape[1]} tokens, ms", f"{ours['prefill'] * 1e3:.1f}", f"{prefill * 1e3:.1f}", f"{prefill / ours['prefill']:.2f}"),
        ("tokens a second", f"{1 / ours['token']:.1f}", f"{1 / token:.1f}", f"{token / ours['token']:.2f}"),
        ("peak memory, GiB", f"{memory / GIB:.1f}", f"{most / GIB:.1f}", ""),
    )


PARTS = {"tabletop": tabletop, "klein": klein, "vlm": vlm}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=[*PARTS, "all"])
    parser.add_argument("--bench", metavar="PROGRAM", help="the bench target, built before")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: no CUDA device")
        return
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}\n")
    for name, part in PARTS.items():
        if arguments.part in (name, "all"):
            part(arguments)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
