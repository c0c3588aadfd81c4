//! Conversations to token ids: `tokenizer.json` and the Jinja chat template of a model folder, as transformers'
//! `apply_chat_template` reads them.

use crate::models::Folder;
use anyhow::{Context, Result, anyhow, bail};
use minijinja::{Environment, Error, ErrorKind, Value, context, syntax::SyntaxConfig};
use serde::Deserialize;
use std::collections::BTreeMap;
use tokenizers::Tokenizer;

/// A piece of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part<'a> {
    Text(&'a str),
    Image,
}

/// One message of a conversation.
#[derive(Clone, Debug)]
pub struct Message<'a> {
    pub role: &'a str,
    pub parts: Vec<Part<'a>>,
}

impl<'a> Message<'a> {
    pub fn user(text: &'a str) -> Self {
        Self { role: "user", parts: vec![Part::Text(text)] }
    }

    pub fn assistant(text: &'a str) -> Self {
        Self { role: "assistant", parts: vec![Part::Text(text)] }
    }

    /// What the user says about an image that comes before it.
    pub fn about_image(text: &'a str) -> Self {
        Self { role: "user", parts: vec![Part::Image, Part::Text(text)] }
    }

    /// A plain string if it is text alone, a list of typed parts otherwise: older templates know only the former.
    fn value(&self) -> Value {
        let content = match self.parts.as_slice() {
            [Part::Text(text)] => Value::from(*text),
            parts => parts
                .iter()
                .map(|part| match part {
                    Part::Text(text) => context! { type => "text", text => *text },
                    Part::Image => context! { type => "image" },
                })
                .collect(),
        };
        context! { role => self.role, content => content }
    }
}

/// Which parts of a conversation the template adds.
#[derive(Clone, Copy, Debug)]
pub struct Rendering {
    /// Opens the assistant's next message.
    pub generation_prompt: bool,
    /// `enable_thinking` of Qwen3's template.
    pub thinking: bool,
}

impl Default for Rendering {
    fn default() -> Self {
        Self { generation_prompt: true, thinking: false }
    }
}

/// The tokenizer and chat template of a model.
pub struct Chat {
    tokenizer: Tokenizer,
    template: Option<Environment<'static>>,
    /// `bos_token` and the like, which templates may name.
    specials: BTreeMap<String, String>,
    pad: u32,
}

/// A special token in `tokenizer_config.json`, a chat template there: both are written in two ways.
#[derive(Deserialize)]
#[serde(untagged)]
enum Token {
    Plain(String),
    Added { content: String },
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Template {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

impl Template {
    fn default(self) -> Option<String> {
        match self {
            Self::One(template) => Some(template),
            Self::Named(list) => list.into_iter().find(|t| t.name == "default").map(|t| t.template),
        }
    }
}

impl Chat {
    /// Reads `tokenizer.json`, `tokenizer_config.json` and the template wherever it is.
    pub fn open(folder: &Folder) -> Result<Self> {
        let file = folder.file("tokenizer.json");
        let mut tokenizer = Tokenizer::from_bytes(folder.read("tokenizer.json")?)
            .map_err(|e| anyhow!("{file} is no tokenizer: {e}"))?;
        // The caller pads and truncates; what the file says about it holds for other programs.
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|e| anyhow!("{file}: {e}"))?;

        let mut config: serde_json::Map<String, serde_json::Value> = folder.json("tokenizer_config.json")?;
        let template = config.remove("chat_template").filter(|t| !t.is_null());
        let specials: BTreeMap<String, String> = config
            .into_iter()
            .filter(|(key, _)| key.ends_with("_token"))
            .filter_map(|(key, value)| match serde_json::from_value(value).ok()? {
                Token::Plain(content) | Token::Added { content } => Some((key, content)),
            })
            .collect();
        let pad = specials.get("pad_token").map_or("<|endoftext|>", String::as_str);
        let pad = tokenizer.token_to_id(pad).with_context(|| format!("{file} lacks the padding token {pad}"))?;

        let template = if folder.has("chat_template.jinja") {
            Some(String::from_utf8(folder.read("chat_template.jinja")?.into_owned())?)
        } else if let Some(template) = template {
            serde_json::from_value::<Template>(template)
                .with_context(|| format!("the chat_template of {}", folder.file("tokenizer_config.json")))?
                .default()
        } else if folder.has("chat_template.json") {
            #[derive(Deserialize)]
            struct Wrapped {
                chat_template: Template,
            }
            folder.json::<Wrapped>("chat_template.json")?.chat_template.default()
        } else {
            None
        };
        let template =
            template.map(environment).transpose().with_context(|| format!("the chat template of {}", folder.name()))?;
        Ok(Self { tokenizer, template, specials, pad })
    }

    /// The conversation as the model's template writes it.
    pub fn render(&self, messages: &[Message], rendering: Rendering) -> Result<String> {
        let Some(environment) = &self.template else { bail!("the tokenizer has no chat template") };
        let messages: Value = messages.iter().map(Message::value).collect();
        let mut variables: BTreeMap<&str, Value> =
            self.specials.iter().map(|(k, v)| (k.as_str(), Value::from(v.as_str()))).collect();
        variables.insert("messages", messages);
        variables.insert("add_generation_prompt", rendering.generation_prompt.into());
        variables.insert("enable_thinking", rendering.thinking.into());
        Ok(environment.get_template(TEMPLATE)?.render(Value::from(variables))?)
    }

    /// Token ids of `text`, in which special tokens are recognised.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.tokenizer.encode_fast(text, true).map_err(|e| anyhow!("cannot tokenize: {e}"))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of `ids`, without special tokens.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.tokenizer.decode(ids, true).map_err(|e| anyhow!("cannot decode tokens: {e}"))
    }

    /// The id of a token, for special ones above all.
    pub fn token(&self, text: &str) -> Option<u32> {
        self.tokenizer.token_to_id(text)
    }

    /// The id of a special token by its role, such as `eos_token`.
    pub fn special(&self, role: &str) -> Option<u32> {
        self.tokenizer.token_to_id(self.specials.get(role)?)
    }

    pub fn pad(&self) -> u32 {
        self.pad
    }

    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }
}

const TEMPLATE: &str = "chat";

/// Jinja as transformers sets it up: blocks leave no blank lines, strings have Python's methods.
fn environment(template: String) -> Result<Environment<'static>> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_template_owned(TEMPLATE, template)?;
    Ok(environment)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vlm::vocabulary;

    fn folder(template: &str) -> (tempfile::TempDir, Folder) {
        let dir = tempfile::tempdir().unwrap();
        vocabulary::train(["a small red ball"; 3], 300).unwrap().write(dir.path()).unwrap();
        std::fs::write(dir.path().join("chat_template.jinja"), template).unwrap();
        let folder = Folder::from(dir.path());
        (dir, folder)
    }

    #[test]
    fn a_template_that_raises_or_does_not_parse_is_an_error() {
        let (_dir, folder_) = folder("{{ raise_exception('no system message') }}");
        let error = Chat::open(&folder_).unwrap().render(&[], Rendering::default()).unwrap_err();
        assert!(format!("{error:#}").contains("no system message"));
        let (_dir, folder_) = folder("{% if %}");
        assert!(format!("{:#}", Chat::open(&folder_).err().unwrap()).contains("chat template"));
    }
}
