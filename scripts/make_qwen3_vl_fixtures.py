"""Makes the golden files of tests/parity_qwen3_vl.rs: small random Qwen3-VL models and what transformers computes with
them, from pictures as its image processor prepares them.

    pip install -r scripts/requirements-fixtures.txt
    python scripts/make_qwen3_vl_fixtures.py tests/fixtures/qwen3_vl
"""

import pathlib
import sys

import numpy
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

IMAGE, VIDEO, START, END, VOCABULARY = 57, 58, 59, 60, 61
TEXT = dict(
    vocab_size=VOCABULARY,
    hidden_size=24,
    intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=12,
    initializer_range=0.3,
    rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 2, 2], mrope_interleaved=True),
)
VISION = dict(
    depth=3,
    hidden_size=16,
    intermediate_size=24,
    num_heads=2,
    patch_size=4,
    out_hidden_size=24,
    num_position_embeddings=16,
    deepstack_visual_indexes=[0, 2],
    initializer_range=0.2,
)
# changes of the text and the vision config, tied embeddings, pictures (width, height)
CASES = {
    # every head its own key head; rows with two pictures of different sizes, with one, with none
    "plain": ({}, {}, False, [(24, 16), (11, 19), (16, 32)]),
    # grouped queries, tied, one deepstack layer, uneven sections, a head of 16, pictures of one size, exact GELU
    "grouped": (
        dict(
            num_key_value_heads=2,
            head_dim=16,
            rope_parameters=dict(rope_type="default", rope_theta=5e6, mrope_section=[4, 2, 2], mrope_interleaved=True),
        ),
        dict(deepstack_visual_indexes=[1], num_position_embeddings=9, hidden_act="gelu"),
        True,
        [(16, 16), (16, 16), (16, 16)],
    ),
}


def picture(width, height, seed):
    noise = numpy.random.default_rng(seed).integers(0, 256, (height, width, 3))
    ramp = numpy.linspace(0, 255, width)[None, :, None]
    return Image.fromarray(((noise + 2 * ramp) / 3).astype(numpy.uint8))


def main(out):
    for seed, (name, (text, vision, tied, sizes)) in enumerate(CASES.items()):
        folder = pathlib.Path(out) / name
        folder.mkdir(parents=True, exist_ok=True)
        processor = Qwen2VLImageProcessorPil(
            patch_size=4, merge_size=2, size={"shortest_edge": 256, "longest_edge": 512}, image_mean=[0.5] * 3
        )
        processor.save_pretrained(folder)
        pictures = [picture(*size, i) for i, size in enumerate(sizes)]
        for i, image in enumerate(pictures):
            image.save(folder / f"{i}.png")
        inputs = processor(pictures, return_tensors="pt")
        grids = inputs["image_grid_thw"]
        tokens = [int(grid.prod()) // 4 for grid in grids]

        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(
            Qwen3VLConfig(
                text_config=TEXT | text,
                vision_config=VISION | vision,
                image_token_id=IMAGE,
                video_token_id=VIDEO,
                vision_start_token_id=START,
                vision_end_token_id=END,
                tie_word_embeddings=tied,
            )
        ).eval()
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.2 * torch.randn_like(parameter)

        words = iter(torch.randint(0, IMAGE, (99,)).tolist())
        say = lambda n: [next(words) for _ in range(n)]  # noqa: E731
        see = lambda i: [START, *[IMAGE] * tokens[i], END]  # noqa: E731
        rows = [say(2) + see(0) + say(3) + see(1) + say(4), see(2) + say(5), say(3)]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        inputs = dict(
            input_ids=ids, attention_mask=mask, mm_token_type_ids=(ids == IMAGE).int() * mask.int(), **inputs
        )
        positions, _ = model.model.get_rope_index(**{k: v for k, v in inputs.items() if k != "pixel_values"})
        output = model(**inputs, output_hidden_states=True, use_cache=False)
        weight = torch.randn_like(output.logits) * mask[..., None]
        (output.logits * weight).mean().backward()
        features = model.model.get_image_features(inputs["pixel_values"], grids, return_dict=True)
        generated = model.generate(
            **inputs,
            max_new_tokens=64,
            min_new_tokens=64,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            suppress_tokens=[IMAGE, VIDEO],
        )
        golden = {
            "pixels": inputs["pixel_values"],
            "grids": grids.int(),
            "ids": ids.int(),
            "lengths": mask.sum(1).int(),
            "positions": positions.int(),
            "features": torch.cat(features.pooler_output),
            "logits": output.logits,
            "weight": weight,
            "generated": generated[:, -64:].int(),
        }
        golden |= {f"deep.{i}": torch.cat(deep) for i, deep in enumerate(features.deepstack_features)}
        golden |= {f"grad.{key}": parameter.grad for key, parameter in model.named_parameters()}
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink()
        save_file({key: value.detach().contiguous() for key, value in golden.items()}, folder / "golden.safetensors")

    # Sizes that the processor chooses, and one picture that it shrinks and one that it enlarges.
    sizes = [(128, 128), (13, 700), (1000, 37), (57, 57), (640, 480), (64, 96), (2000, 1500), (30, 30), (100, 84)]
    processor = Qwen2VLImageProcessorPil(patch_size=16, size={"shortest_edge": 4096, "longest_edge": 10000})
    folder = pathlib.Path(out) / "sizes"
    processor.save_pretrained(folder)
    golden = {"sizes": torch.tensor(sizes).int()}
    grids = [processor(Image.new("RGB", size), return_tensors="pt")["image_grid_thw"][0, 1:] for size in sizes]
    golden["grids"] = torch.stack(grids).int()
    for i, size in enumerate([(130, 91), (41, 53)]):
        image = picture(*size, 9 + i)
        image.save(folder / f"{i}.png")
        golden[f"pixels.{i}"] = processor(image, return_tensors="pt")["pixel_values"].half()
    save_file(golden, folder / "golden.safetensors")


if __name__ == "__main__":
    main(sys.argv[1])
