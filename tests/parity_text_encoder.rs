//! `vlm::{chat, vocabulary, text_encoder}` against transformers and diffusers: the golden files are made by
//! `scripts/make_text_encoder_fixtures.py`.

#![allow(clippy::unwrap_used)]

mod golden;

use candle_core::{DType, Device};
use golden::{Golden, assert_close, fixture};
use rlrig::{
    models::Folder,
    vlm::{
        chat::{Chat, Message, Rendering},
        text_encoder::TextEncoder,
        vocabulary,
    },
};
use serde::Deserialize;

#[derive(Deserialize)]
struct Texts {
    texts: Vec<Text>,
    messages: Vec<Said>,
    rendered: String,
}

#[derive(Deserialize)]
struct Text {
    text: String,
    decoded: String,
}

#[derive(Deserialize)]
struct Said {
    role: String,
    content: String,
}

fn folder() -> Folder {
    Folder::from(fixture("text_encoder"))
}

#[test]
fn tokens_and_conversations_are_those_of_transformers() {
    let chat = Chat::open(&folder()).unwrap();
    let golden = Golden::open("text_encoder/golden.safetensors");
    let Texts { texts, messages, rendered } = folder().json("golden.json").unwrap();
    for (i, Text { text, decoded }) in texts.iter().enumerate() {
        let ids = chat.encode(text).unwrap();
        let want = golden.ints(&format!("ids.{i}"));
        assert_eq!(ids.iter().map(|id| i64::from(*id)).collect::<Vec<_>>(), want, "{text:?}");
        assert_eq!(&chat.decode(&ids).unwrap(), decoded);
    }
    let messages: Vec<Message> =
        messages.iter().map(|m| Message { role: &m.role, ..Message::user(&m.content) }).collect();
    assert_eq!(chat.render(&messages, Rendering::default()).unwrap(), rendered);
}

#[test]
fn prompt_embeddings_are_those_of_the_klein_pipeline() {
    let encoder = TextEncoder::open(&folder(), &folder(), DType::F32, &Device::Cpu).unwrap();
    let golden = Golden::open("text_encoder/golden.safetensors").get("embeds");
    let Texts { texts, .. } = folder().json("golden.json").unwrap();
    let prompts: Vec<&str> = texts.iter().map(|t| t.text.as_str()).collect();
    let embeds = encoder.prompt_embeds(&prompts, 48, &[1, 2, 3]).unwrap();
    assert_close("the prompt embedding", &embeds, &golden, 1e-4);
}

#[test]
fn a_tokenizer_trained_here_is_the_one_trained_by_the_tokenizers_library() {
    let corpus = std::fs::read_to_string(fixture("text_encoder/corpus.txt")).unwrap();
    // 340 learned tokens, as the script asks for, behind them our special tokens.
    let vocabulary = vocabulary::train(corpus.lines(), 340 + vocabulary::SPECIALS.len()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    vocabulary.write(dir.path()).unwrap();
    let ours = Chat::open(&Folder::from(dir.path())).unwrap();
    let theirs = Chat::open(&folder()).unwrap();
    for text in corpus.lines().chain(["Blue, green... 12 rings?\n{\"a\": [1]}"]) {
        assert_eq!(ours.encode(text).unwrap(), theirs.encode(text).unwrap(), "{text}");
    }
    assert!(vocabulary::split_words(ours.tokenizer(), corpus.lines()).is_empty());
    let rendered = ours.render(&[Message::about_image("a red ball")], Rendering::default()).unwrap();
    assert_eq!(rendered, "<|vision_start|><|image_pad|><|vision_end|>a red ball<|im_end|><|im_start|>");
    assert_eq!(ours.special("eos_token"), ours.token("<|im_end|>"));
    assert_eq!(ours.token("<|endoftext|>"), Some(ours.pad()));
}
