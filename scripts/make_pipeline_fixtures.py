"""Makes tests/fixtures/klein: a whole FLUX.2-klein folder of tiny random models, and what diffusers draws with it.

    pip install -r scripts/requirements-fixtures.txt
    python scripts/make_pipeline_fixtures.py tests/fixtures/klein

The tokenizer is that of tests/fixtures/text_encoder (scripts/make_text_encoder_fixtures.py), which must lie beside it.
"""

import inspect
import json
import pathlib
import shutil
import sys

import numpy
import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

PROMPTS = ["a small red ball to the left of a large blue cube", "a green ring above a cone"]
EMBEDDING = dict(max_length=40, layers=[1, 2, 3])  # klein has 512 and 9, 18, 27
WIDTH, HEIGHT = 96, 64


def randomise(model, std):
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
        if parameter.ndim == 1:
            parameter.data += 1
    return model.eval()


def build(out):
    torch.manual_seed(0)
    shutil.rmtree(out, ignore_errors=True)
    tokenizer = out.parent / "text_encoder"
    (out / "tokenizer").mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, out / "tokenizer" / name)
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    text_encoder = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            initializer_range=0.3,
            tie_word_embeddings=True,
        )
    )
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * 16,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        rope_theta=2000,
        guidance_embeds=False,
    )
    vae = AutoencoderKLFlux2(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=HEIGHT,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    pipe = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        transformer=randomise(transformer, 0.25),
    )
    pipe.save_pretrained(out)
    config = out / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | dict(prompt_embedding=EMBEDDING), indent=2) + "\n")


def draw(pipe, prompt, noise, steps, guidance, image=None):
    """The final tokens in the order of the transformer, and the pictures in [0, 1]."""
    tokens = []

    def keep(pipe, step, timestep, state):
        tokens[:] = [state["latents"]]
        return state

    pictures = pipe(
        prompt=prompt,
        image=image,
        latents=noise,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=steps,
        guidance_scale=guidance,
        callback_on_step_end=keep,
        max_sequence_length=EMBEDDING["max_length"],
        text_encoder_out_layers=EMBEDDING["layers"],
        output_type="np",
    ).images
    return {"latents": tokens[0], "pictures": torch.from_numpy(pictures)}


def defaults():
    """What klein takes where a call does not say otherwise."""
    parameters = inspect.signature(Flux2KleinPipeline.__call__).parameters
    names = {"max_length": "max_sequence_length", "layers": "text_encoder_out_layers"}
    return {ours: parameters[theirs].default for ours, theirs in names.items()}


def main(out):
    build(out)
    (out / "defaults.json").write_text(json.dumps(defaults()) + "\n")
    pipe = Flux2KleinPipeline.from_pretrained(out)  # as any user would, our extra key in place
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(1)
    noise = torch.randn(2, 16, HEIGHT // 16, WIDTH // 16)
    y, x = numpy.mgrid[0:80, 0:112]  # not a multiple of a token: the middle is cropped
    channels = [numpy.sin(x / 9), numpy.cos(y / 7), numpy.sin((x + y) / 11)]
    picture = Image.fromarray((127.5 + 120 * numpy.stack(channels, -1)).astype(numpy.uint8))
    picture.save(out / "reference.png")
    runs = {
        "guided": draw(pipe, PROMPTS, noise, 4, 4.0),
        "plain": draw(pipe, PROMPTS, noise, 3, 1.0),
        "edit": draw(pipe, PROMPTS[1], noise[:1], 4, 2.5, picture),
    }
    golden = {f"{name}.{key}": tensor.contiguous() for name, run in runs.items() for key, tensor in run.items()}
    encoded = pipe.image_processor.preprocess(picture, height=80, width=112, resize_mode="crop")
    golden["reference"] = pipe._encode_vae_image(encoded, None).detach().contiguous()
    save_file(golden | {"noise": noise}, out / "golden.safetensors")
    for name, run in runs.items():
        print(name, {key: (tensor.std().item(), tensor.min().item(), tensor.max().item()) for key, tensor in run.items()})


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
