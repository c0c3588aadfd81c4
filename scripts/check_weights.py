"""Opens the shipped weights in diffusers and transformers and compares them with rlrig.

The same picture from the same noise (mean absolute difference at most 1/255), and the same probability that a claim about
it holds. Adapters that `rlrig train grpo` wrote are loaded by PEFT onto the model that has their layers. Needs a built rlrig
and the packages of scripts/requirements-fixtures.txt:

    cargo build --release && python scripts/check_weights.py [FOLDER [ADAPTER ..]]
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import Flux2KleinPipeline
from peft import PeftConfig, PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoTokenizer, Qwen3VLForConditionalGeneration

ROOT = Path(__file__).parent.parent
FOLDER = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "weights" / "tabletop"
ADAPTERS = sys.argv[2:]
PROMPT = "a small red ball to the left of a large blue cube"
STEPS, GUIDANCE = 12, 3.0


def rlrig(*arguments, adapters):
    flags = [part for adapter in adapters for part in ("--adapter", f"all={adapter}")]
    command = [ROOT / "target" / "release" / "rlrig", *map(str, arguments), *flags]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


# How many models have the layers of each adapter.
FITS = dict.fromkeys(ADAPTERS, 0)


def adapted(model):
    """The model with the adapters whose layers it has, and which these are."""
    layers = {name for name, _ in model.named_modules()}
    fitting = [a for a in ADAPTERS if layers.issuperset(PeftConfig.from_pretrained(a).target_modules)]
    for adapter in fitting:
        FITS[adapter] += 1
        model = PeftModel.from_pretrained(model, adapter).eval().get_base_model()
    return model, fitting


def picture(folder):
    """The picture of diffusers beside that of rlrig."""
    out, noise = folder / "rlrig.png", folder / "noise.safetensors"
    rlrig(
        *["generate", "-q", "--device", "cpu", "--dtype", "f32", "--model", FOLDER, "--vlm", FOLDER / "vlm"],
        *["--prompt", PROMPT, "--seed", 7, "--rounds", 1, "--steps", STEPS, "--guidance", GUIDANCE],
        *["--out", out, "--save-noise", noise],
        adapters=ADAPTERS,
    )
    pipeline = Flux2KleinPipeline.from_pretrained(FOLDER, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.transformer, _ = adapted(pipeline.transformer)
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


def calibrated(p, claim):
    """A probability as the calibration in the VLM's folder, if there is one, has it."""
    file = FOLDER / "vlm" / "calibration.json"
    if not file.exists():
        return p
    calibration = json.loads(file.read_text())
    if "object" in claim:
        scaling = calibration["object"]
    else:
        scaling = calibration.get("predicates", {}).get(claim["relation"]["relation"], calibration["relation"])
    p = min(max(p, 1e-4), 1 - 1e-4)
    return 1 / (1 + np.exp(-(scaling["scale"] * np.log(p / (1 - p)) + scaling["bias"])))


def capped(claims, odds):
    """The probabilities, with no relation more probable than its objects."""
    objects = {claim["object"]: p for claim, p in zip(claims, odds) if "object" in claim}

    def ends(claim):
        relation = claim.get("relation")
        return [objects[relation["subject"]], objects[relation["object"]]] if relation else []

    return [min([p, *ends(claim)]) for claim, p in zip(claims, odds)]


def answers(image):
    """The greedy answers of transformers about a picture's claims, and their odds of "yes", beside those of rlrig."""
    folder = FOLDER / "vlm"
    model, fitting = adapted(Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval())
    asked = ["check", "--image", image, "--prompt", PROMPT, "--vlm", folder, "--dtype", "f32", "--json"]
    document = json.loads(rlrig(*asked, adapters=fitting))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    seen = processor(images=Image.open(image).convert("RGB"), return_tensors="pt")
    places = int(seen["image_grid_thw"].prod()) // processor.merge_size**2
    yes, no = (tokenizer(word).input_ids[0] for word in ("yes", "no"))
    claims, odds, phrases = [], [], []
    for verdict in document["verdicts"]:
        claim = verdict["claim"]
        words = claim.get("object") or " ".join(claim["relation"][key] for key in ("subject", "relation", "object"))
        question = (
            f'Does the picture show "{words}"? Answer in JSON with "reflection" (what is seen of it, and where: x and y '
            'in percent) and "verdict" (yes or no).'
        )
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        text = text.replace("<|image_pad|>", "<|image_pad|>" * places)
        ids = torch.tensor([tokenizer(text).input_ids])
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == model.config.image_token_id).int(),
            pixel_values=seen["pixel_values"],
            image_grid_thw=seen["image_grid_thw"],
            max_new_tokens=60,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        said = out.sequences[0, ids.shape[1] :].tolist()
        answer = json.loads(tokenizer.decode(said, skip_special_tokens=True))
        word = max(i for i, token in enumerate(said) if token in (yes, no))
        claims.append(claim)
        odds.append(out.logits[word][0, [yes, no]].softmax(0)[0].item())
        phrases.append(words)
        print(f"{words}: {answer['reflection']}")
        assert answer["reflection"] == verdict.get("reflection", ""), "rlrig and transformers see different things"
    # In rlrig's order: what a look says is made consistent, then the mean of the looks (here there is one) is calibrated,
    # which may undo that, and made consistent again.
    odds = [calibrated(p, claim) for p, claim in zip(capped(claims, odds), claims)]
    for words, p_yes, verdict in zip(phrases, capped(claims, odds), document["verdicts"]):
        print(f"{words}: P(yes) {p_yes:.4f} and {verdict['p_yes']:.4f} of rlrig")
        assert abs(p_yes - verdict["p_yes"]) < 1e-3, "rlrig and transformers are not equally sure"


def main():
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        picture(Path(folder))
        answers(Path(folder) / "rlrig.png")
    wrong = [adapter for adapter, models in FITS.items() if models != 1]
    assert not wrong, f"not of exactly one of the models: {', '.join(wrong)}"
    print("the shipped weights are those of a Flux2KleinPipeline and of a Qwen3VLForConditionalGeneration")


if __name__ == "__main__":
    main()
