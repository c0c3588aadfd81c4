//! Trains the tokenizer of our own small models: byte-level BPE with the pre-tokenization and the special tokens of Qwen,
//! in files that transformers' `AutoTokenizer` loads as `Qwen2Tokenizer`.

use anyhow::{Context, Result, anyhow, ensure};
use candle_core::{Device, Tensor};
use serde_json::{Value, json};
use std::{
    collections::{BTreeSet, HashMap},
    path::Path,
};
use tokenizers::{
    AddedToken, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper, SplitDelimiterBehavior, TokenizerImpl,
    decoders::byte_level::ByteLevel,
    models::bpe::{BPE, BpeTrainer},
    normalizers::unicode::NFC,
    pre_tokenizers::{
        sequence::Sequence,
        split::{Split, SplitPattern},
    },
};

/// Ids follow those of the learned tokens, in this order.
pub const SPECIALS: [&str; 7] = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
];

/// Contractions, words with the space before them, single digits, punctuation, line ends, spaces: `Qwen2Tokenizer`
/// splits by this before any merge.
const WORDS: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Two tokens around a message, and one before each answer: captions stay short.
pub const TEMPLATE: &str = "\
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}<|im_start|>{%- endif -%}
{%- if message.content is string -%}{{ message.content }}{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>{%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>{%- endif -%}";

/// The files of a trained tokenizer.
pub struct Vocabulary {
    /// `tokenizer.json`.
    pub tokenizer: String,
    /// `tokenizer_config.json`.
    pub config: String,
}

impl Vocabulary {
    pub fn write(&self, folder: &Path) -> Result<()> {
        for (name, text) in [("tokenizer.json", &self.tokenizer), ("tokenizer_config.json", &self.config)] {
            let path = folder.join(name);
            std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(())
    }
}

/// What a checkpoint keeps of a vocabulary, to know it again.
const STATE: &str = "vocabulary";

/// A tokenizer's file as part of a checkpoint: its ids are what the weights mean.
pub fn state(tokenizer: &str) -> Result<HashMap<String, Tensor>> {
    Ok(HashMap::from([(STATE.to_owned(), Tensor::from_slice(tokenizer.as_bytes(), tokenizer.len(), &Device::Cpu)?)]))
}

/// An error if a checkpoint's vocabulary is not `tokenizer`: what it is learned from may change from version to version.
pub fn expect_state(state: &HashMap<String, Tensor>, tokenizer: &str) -> Result<()> {
    let Some(kept) = state.get(STATE) else { return Ok(()) };
    ensure!(
        kept.to_vec1::<u8>()? == tokenizer.as_bytes(),
        "the run began with another vocabulary, from another version of rlrig: begin a new run with the old one's model \
         folder as its start"
    );
    Ok(())
}

/// Learns at most `size` tokens, special ones included, from `texts`.
pub fn train<S: AsRef<str> + Send>(
    texts: impl IntoIterator<Item = S, IntoIter: Send>,
    size: usize,
) -> Result<Vocabulary> {
    train_with_phrases(texts, size, &[])
}

/// The same with whole `phrases` as tokens.
///
/// BPE cannot learn them, because it splits at words first. So what every question and answer repeats costs one token
/// each; from what lies between the phrases in `texts` the other tokens are learned.
pub fn train_with_phrases<S: AsRef<str> + Send>(
    texts: impl IntoIterator<Item = S, IntoIter: Send>,
    size: usize,
    phrases: &[&str],
) -> Result<Vocabulary> {
    let least = 256 + SPECIALS.len() + phrases.len();
    ensure!(size >= least, "a byte-level vocabulary has at least {least} tokens");
    let failed = |e: tokenizers::Error| anyhow!("cannot train a tokenizer: {e}");
    let bytes = ByteLevel::new(false, false, false);
    let words = Split::new(SplitPattern::Regex(WORDS.to_owned()), SplitDelimiterBehavior::Isolated, false);
    let words: PreTokenizerWrapper = Sequence::new(vec![words.map_err(failed)?.into(), bytes.into()]).into();
    let mut tokenizer =
        TokenizerImpl::<BPE, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, ByteLevel>::new(
            BPE::default(),
        );
    tokenizer.with_normalizer(Some(NFC)).map_err(failed)?;
    tokenizer.with_pre_tokenizer(Some(words)).with_post_processor(Some(bytes)).with_decoder(Some(bytes));
    let mut trainer = BpeTrainer::builder()
        .show_progress(false)
        .vocab_size(size - SPECIALS.len() - phrases.len())
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    let between = texts.into_iter().flat_map(|text| between(text.as_ref(), phrases));
    tokenizer.train(&mut trainer, between).map_err(failed)?;
    tokenizer.add_special_tokens(SPECIALS.map(|s| AddedToken::from(s, true))).map_err(failed)?;
    let phrases = phrases.iter().map(|p| AddedToken::from(*p, false).normalized(false));
    tokenizer.add_tokens(phrases).map_err(failed)?;
    let config = json!({
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": false,
        "bos_token": Value::Null,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": Value::Null,
        "padding_side": "right",
        "clean_up_tokenization_spaces": false,
        "model_max_length": 1024,
        "additional_special_tokens": SPECIALS[1..],
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "vision_bos_token": "<|vision_start|>",
        "vision_eos_token": "<|vision_end|>",
        "chat_template": TEMPLATE,
    });
    Ok(Vocabulary {
        tokenizer: tokenizer.to_string(false).map_err(failed)?,
        config: serde_json::to_string_pretty(&config)?,
    })
}

/// The pieces of `text` that are no phrase.
fn between(text: &str, phrases: &[&str]) -> Vec<String> {
    let mut pieces = vec![text.to_owned()];
    for phrase in phrases {
        pieces = pieces.iter().flat_map(|piece| piece.split(phrase)).map(str::to_owned).collect();
    }
    pieces
}

/// The words of `texts` that `vocabulary` has no single token for, with the space that goes before them.
pub fn split_words<'a>(
    vocabulary: &tokenizers::Tokenizer,
    texts: impl IntoIterator<Item = &'a str>,
) -> BTreeSet<String> {
    let words: BTreeSet<String> = texts
        .into_iter()
        .flat_map(|text| text.split(' ').enumerate().map(|(i, w)| if i == 0 { w.to_owned() } else { format!(" {w}") }))
        .map(|word| word.trim_end_matches(|c: char| !c.is_alphanumeric()).to_owned())
        .filter(|word| word.chars().all(|c| c.is_alphabetic() || c == ' '))
        .collect();
    let whole = |word: &String| vocabulary.encode_fast(word.as_str(), false).is_ok_and(|e| e.len() == 1);
    words.into_iter().filter(|word| !word.is_empty() && !whole(word)).collect()
}
