//! Conversations to token ids: `tokenizer.json` and the Jinja chat template of a model folder, as transformers'
//! `apply_chat_template` reads them.

use crate::models::Folder;
use anyhow::{Context, Result, anyhow, bail};
use minijinja::{Environment, Error, ErrorKind, Value, context, syntax::SyntaxConfig};
use serde::Deserialize;
use std::{
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
};
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
    /// Its `tokenizer.json`, for messages.
    file: String,
    /// With the file that it is from.
    template: Option<(String, Environment<'static>)>,
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
        let bytes = folder.read("tokenizer.json")?;
        let mut tokenizer = guarded(&file, "is no tokenizer", || Tokenizer::from_bytes(bytes))?;
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

        let template = match find_template(folder, template)? {
            Some((file, text)) => {
                let environment = environment(text).with_context(|| format!("the chat template of {file}"))?;
                Some((file, environment))
            }
            None => None,
        };
        Ok(Self { tokenizer, file, template, specials, pad })
    }

    /// Errs if a token has no row in a model's embedding of `rows` tokens.
    pub fn expect_within(&self, rows: usize) -> Result<()> {
        let beyond = self.tokenizer.get_vocab(true).into_iter().filter(|(_, id)| *id as usize >= rows);
        match beyond.max_by_key(|(_, id)| *id) {
            None => Ok(()),
            Some((token, id)) => {
                bail!(
                    "{} is another model's: its token {token:?} has the id {id}, and this one knows {rows}",
                    self.file
                )
            }
        }
    }

    /// The conversation as the model's template writes it.
    pub fn render(&self, messages: &[Message], rendering: Rendering) -> Result<String> {
        let Some((file, environment)) = &self.template else { bail!("{} has no chat template beside it", self.file) };
        let messages: Value = messages.iter().map(Message::value).collect();
        let mut variables: BTreeMap<&str, Value> =
            self.specials.iter().map(|(k, v)| (k.as_str(), Value::from(v.as_str()))).collect();
        variables.insert("messages", messages);
        variables.insert("add_generation_prompt", rendering.generation_prompt.into());
        variables.insert("enable_thinking", rendering.thinking.into());
        let rendered = environment.get_template(TEMPLATE).and_then(|template| template.render(Value::from(variables)));
        rendered.with_context(|| format!("the chat template of {file}"))
    }

    /// Token ids of `text`, in which special tokens are recognised.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = guarded(&self.file, "cannot tokenize", || self.tokenizer.encode_fast(text, true))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of `ids`, without special tokens.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        guarded(&self.file, "cannot decode tokens", || self.tokenizer.decode(ids, true))
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

    /// The `tokenizer.json` it is from.
    pub fn file(&self) -> &str {
        &self.file
    }

    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }
}

/// What `work` with a tokenizer gives. The tokenizers crate trusts `tokenizer.json`, and panics where that makes no sense:
/// here this is an error as any other.
pub(super) fn guarded<T>(file: &str, failure: &str, work: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
    let done = catch_unwind(AssertUnwindSafe(work)).map_err(|_| anyhow!("{file} {failure}: it makes no sense"))?;
    done.map_err(|e| anyhow!("{file} {failure}: {e}"))
}

/// The text of a model's chat template, with the file that has it; `configured` is what `tokenizer_config.json` has.
fn find_template(folder: &Folder, configured: Option<serde_json::Value>) -> Result<Option<(String, String)>> {
    #[derive(Deserialize)]
    struct Wrapped {
        chat_template: Template,
    }
    let (name, text) = if folder.has("chat_template.jinja") {
        let name = "chat_template.jinja";
        let text = String::from_utf8(folder.read(name)?.into_owned());
        (name, Some(text.with_context(|| format!("{} is not in UTF-8", folder.file(name)))?))
    } else if let Some(template) = configured {
        let name = "tokenizer_config.json";
        let template = serde_json::from_value::<Template>(template);
        (name, template.with_context(|| format!("the chat_template of {}", folder.file(name)))?.default())
    } else if folder.has("chat_template.json") {
        let name = "chat_template.json";
        (name, folder.json::<Wrapped>(name)?.chat_template.default())
    } else {
        return Ok(None);
    };
    Ok(text.map(|text| (folder.file(name), text)))
}

const TEMPLATE: &str = "chat";

/// What one rendering may spend: about so many steps, or 64 times as many bytes. A real template needs some thousand.
const FUEL: u64 = 1_000_000;

/// Jinja as transformers sets it up: blocks leave no blank lines, strings have Python's methods.
fn environment(template: String) -> Result<Environment<'static>> {
    let mut environment = Environment::new();
    // A template comes from anywhere, and must neither run forever nor take all memory.
    environment.set_fuel(Some(FUEL));
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

    #[test]
    fn a_template_without_end_or_measure_is_an_error_that_names_its_file() {
        for template in [
            "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
            r#"{{ "a\nb"|indent(100000000000000) }}"#,
            "{{ 'a' * 1000000000000000 }}",
            "{{ 'a' * 99999999 }}",
        ] {
            let (_dir, folder_) = folder(template);
            let error = Chat::open(&folder_).unwrap().render(&[], Rendering::default()).unwrap_err();
            assert!(error.to_string().contains("chat_template.jinja"), "{template}: {error:#}");
        }
    }

    #[test]
    fn a_tokenizer_that_makes_no_sense_is_an_error_that_names_its_file() {
        let nothing = serde_json::json!({"String": ""});
        for (part, bad) in [
            ("normalizer", serde_json::json!({"type": "Replace", "pattern": nothing, "content": "x"})),
            ("pre_tokenizer", serde_json::json!({"type": "FixedLength", "length": 0})),
        ] {
            let (dir, folder) = folder("{{ messages }}");
            let path = dir.path().join("tokenizer.json");
            let mut tokenizer: serde_json::Value = folder.json("tokenizer.json").unwrap();
            tokenizer[part] = bad;
            std::fs::write(&path, tokenizer.to_string()).unwrap();
            // Tokenizers 0.23 reads both, and panics where they are used.
            let error = Chat::open(&folder).and_then(|chat| chat.encode("a ball")).unwrap_err().to_string();
            assert!(error.ends_with("tokenizer.json cannot tokenize: it makes no sense"), "{part}: {error}");
        }
        let (_dir, folder) = folder("{{ messages }}");
        let chat = Chat::open(&folder).unwrap();
        let ids = chat.tokenizer().get_vocab(true).into_values().max().unwrap() as usize + 1;
        chat.expect_within(ids).unwrap();
        let error = chat.expect_within(ids - 1).unwrap_err().to_string();
        assert!(error.contains("tokenizer.json") && error.contains(&format!("the id {}", ids - 1)), "{error}");
        let panics = || -> tokenizers::Result<()> { panic!("a tokenizer's") };
        let error = guarded("a/tokenizer.json", "cannot tokenize", panics).unwrap_err().to_string();
        assert!(error.starts_with("a/tokenizer.json cannot tokenize"), "{error}");
    }
}
