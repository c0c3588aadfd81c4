"""Makes the golden files of tests/parity_text_encoder.rs: a tokenizer as `vlm::vocabulary` trains it, loaded by
transformers, and the prompt embeddings of Flux2KleinPipeline from a small random Qwen3.

    pip install -r scripts/requirements-fixtures.txt
    python scripts/make_text_encoder_fixtures.py tests/fixtures/text_encoder
"""

import itertools
import json
import pathlib
import sys

import torch
from diffusers import Flux2KleinPipeline
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# What the templates of Qwen3 and its relatives do: namespaces, reversed loops, Python's string methods, thinking.
TEMPLATE = """\
{%- set ns = namespace(last=messages|length - 1, multi=false) %}
{%- for message in messages[::-1] %}
    {%- if message.role == "user" and message.content is string and not message.content.startswith('<tool>') %}
        {%- set ns.last = messages|length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content.split('</think>')[-1].lstrip('\\n') + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
TEXTS = [
    "a small red ball to the left of a large blue cube",
    "Above the green ring: 2 cones, 37 stars!",
    "",
    "  two   spaces\n\nand lines \t tab",
    "it's a naïve café ☃ 漢字 e\u0301",
    "{\"verdict\": \"yes\", \"objects\": [\"a red ball\"]}",
    "<|im_start|>special <|im_end|> tokens<|endoftext|>",
    "a large blue cube " * 12,
]


def corpus():
    sizes, colours, shapes = ["small", "large"], ["red", "green", "blue"], ["ball", "cube", "ring", "cone", "star"]
    relations = ["left of", "right of", "above", "below", "inside"]
    objects = [" ".join(parts) for parts in itertools.product(sizes, colours, shapes)]
    return [f"a {a} {relations[i % 5]} the {objects[(7 * i + 3) % len(objects)]}" for i, a in enumerate(objects * 3)]


def main(out):
    out = pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "corpus.txt").write_text("\n".join(corpus()))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        corpus(), trainers.BpeTrainer(vocab_size=340, show_progress=False, initial_alphabet=alphabet)
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIALS])
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    config = dict(tokenizer_class="Qwen2Tokenizer", eos_token="<|im_end|>", pad_token="<|endoftext|>")
    (out / "tokenizer_config.json").write_text(json.dumps(config | dict(chat_template=TEMPLATE), indent=1))

    tokenizer = AutoTokenizer.from_pretrained(out)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            initializer_range=0.3,
            tie_word_embeddings=True,
        )
    ).eval()
    model.save_pretrained(out)
    golden = {f"ids.{i}": torch.tensor(tokenizer(text).input_ids).int() for i, text in enumerate(TEXTS)}
    embeds = Flux2KleinPipeline._get_qwen3_prompt_embeds(
        model, tokenizer, TEXTS, max_sequence_length=48, hidden_states_layers=[1, 2, 3]
    )
    save_file(golden | {"embeds": embeds.detach().contiguous()}, out / "golden.safetensors")
    messages = [
        {"role": "user", "content": "draw a ball"},
        {"role": "assistant", "content": "<think>\nwhich?\n</think>\n\na red ball"},
        {"role": "user", "content": "and a cube é"},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    texts = [dict(text=text, decoded=tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True)) for text in TEXTS]
    (out / "golden.json").write_text(json.dumps(dict(texts=texts, messages=messages, rendered=rendered), indent=1))


if __name__ == "__main__":
    main(sys.argv[1])
