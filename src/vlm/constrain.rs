//! Decoding under a JSON schema: at each step only tokens that can still lead to a valid answer are allowed, so every
//! answer parses.
//!
//! A schema is an [`Automaton`] over bytes, made deterministic as it is walked. For each state the allowed tokens are found by
//! a walk through the trie of the vocabulary, once.

use super::{
    automaton::Automaton,
    chat::{Chat, guarded},
};
use anyhow::{Context, Result};
use serde_json::Value;
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokenizers::Tokenizer;

/// The tokens of a byte-level vocabulary by their bytes; special tokens are not among them.
pub struct Vocabulary {
    tokenizer: Tokenizer,
    /// Its file, for messages.
    file: String,
    /// Added tokens that are text: a tokenizer finds them, from the left and the longest first, before all else.
    phrases: HashMap<u32, String>,
    bytes: HashMap<u32, Vec<u8>>,
    trie: Vec<Node>,
}

#[derive(Default)]
struct Node {
    children: Vec<(u8, usize)>,
    tokens: Vec<u32>,
}

impl Vocabulary {
    pub fn new(chat: &Chat) -> Self {
        let tokenizer = chat.tokenizer();
        let alphabet = byte_alphabet();
        let added = tokenizer.get_added_tokens_decoder();
        let mut bytes: HashMap<u32, Vec<u8>> = HashMap::new();
        for (token, id) in tokenizer.get_vocab(false) {
            let decoded: Option<Vec<u8>> = token.chars().map(|c| alphabet.get(&c).copied()).collect();
            if let Some(decoded) = decoded.filter(|b| !b.is_empty() && !added.contains_key(&id)) {
                bytes.insert(id, decoded);
            }
        }
        let phrases: HashMap<u32, String> =
            added.into_iter().filter(|(_, t)| !t.special).map(|(id, t)| (id, t.content)).collect();
        bytes.extend(phrases.iter().map(|(id, phrase)| (*id, phrase.clone().into_bytes())));
        let mut ids: Vec<u32> = bytes.keys().copied().collect();
        ids.sort_unstable();
        let mut trie = vec![Node::default()];
        for id in ids {
            let mut at = 0;
            for byte in &bytes[&id] {
                at = match trie[at].children.iter().find(|(b, _)| b == byte) {
                    Some((_, child)) => *child,
                    None => {
                        trie.push(Node::default());
                        let child = trie.len() - 1;
                        trie[at].children.push((*byte, child));
                        child
                    }
                };
            }
            trie[at].tokens.push(id);
        }
        let mut tokenizer = tokenizer.clone();
        // The words of a schema may be a data set's.
        tokenizer.set_encode_special_tokens(true);
        Self { tokenizer, file: chat.file().to_owned(), phrases, bytes, trie }
    }
}

impl Vocabulary {
    /// How much of `text` no phrase can take that begins in it and ends in what follows.
    fn settled(&self, text: &str) -> usize {
        let mut at = 0;
        while let Some(next) = text[at..].chars().next() {
            let rest = &text[at..];
            if self.phrases.values().any(|p| p.len() > rest.len() && p.starts_with(rest)) {
                return at;
            }
            let whole = self.phrases.values().filter(|p| rest.starts_with(p.as_str())).map(String::len).max();
            at += whole.unwrap_or(next.len_utf8());
        }
        at
    }
}

/// The characters by which byte-level BPE writes bytes: printable ones stand for themselves, the others are moved up
/// behind U+0100 in order.
fn byte_alphabet() -> HashMap<char, u8> {
    let printable = |b: &u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let plain = (0..=255u8).filter(printable).map(|b| (char::from(b), b));
    let moved = (0..=255u8).filter(|b| !printable(b)).zip('\u{100}'..).map(|(b, c)| (c, b));
    plain.chain(moved).collect()
}

/// The deterministic states met so far.
#[derive(Default)]
struct Walked {
    numbers: HashMap<Vec<usize>, usize>,
    states: Vec<Vec<usize>>,
    steps: HashMap<(usize, u8), Option<usize>>,
    allowed: HashMap<usize, Arc<[u32]>>,
}

/// A schema compiled for a vocabulary.
pub struct Grammar {
    automaton: Automaton,
    distance: Vec<usize>,
    vocabulary: Arc<Vocabulary>,
    walked: Mutex<Walked>,
}

/// How far one answer has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress(usize);

impl Grammar {
    pub fn new(schema: &Value, vocabulary: Arc<Vocabulary>) -> Result<Self> {
        let automaton = Automaton::new(schema)?;
        let distance = automaton.distances();
        let grammar = Self { automaton, distance, vocabulary, walked: Mutex::default() };
        let begin = grammar.automaton.closure([Automaton::START]);
        number(&mut grammar.walked(), begin);
        Ok(grammar)
    }

    /// The beginning of an answer.
    pub fn begin(&self) -> Progress {
        Progress(0)
    }

    fn walked(&self) -> MutexGuard<'_, Walked> {
        // What is stored is only ever added to, and each entry is whole.
        self.walked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn step(&self, walked: &mut Walked, from: usize, byte: u8) -> Option<usize> {
        if let Some(known) = walked.steps.get(&(from, byte)) {
            return *known;
        }
        let edges = walked.states[from].iter().flat_map(|state| &self.automaton.edges[*state]);
        let reached: Vec<usize> =
            edges.filter(|(low, high, _)| (*low..=*high).contains(&byte)).map(|(_, _, to)| *to).collect();
        let to = (!reached.is_empty()).then(|| number(walked, self.automaton.closure(reached)));
        walked.steps.insert((from, byte), to);
        to
    }

    /// Whether the answer is whole and nothing may follow.
    pub fn is_done(&self, at: Progress) -> bool {
        self.walked().states[at.0].contains(&self.automaton.accept)
    }

    /// The tokens that may come next, in order of their ids.
    pub fn allowed(&self, at: Progress) -> Arc<[u32]> {
        let mut walked = self.walked();
        if let Some(known) = walked.allowed.get(&at.0) {
            return known.clone();
        }
        let mut tokens = Vec::new();
        let mut todo = vec![(0, at.0)];
        while let Some((node, state)) = todo.pop() {
            let node = &self.vocabulary.trie[node];
            tokens.extend(&node.tokens);
            for (byte, child) in &node.children {
                if let Some(next) = self.step(&mut walked, state, *byte) {
                    todo.push((*child, next));
                }
            }
        }
        tokens.sort_unstable();
        let tokens: Arc<[u32]> = tokens.into();
        walked.allowed.insert(at.0, tokens.clone());
        tokens
    }

    /// Those of [`Self::allowed`] that bring the answer nearest to its end: for one that has become too long.
    pub fn closing(&self, at: Progress) -> Vec<u32> {
        let left = |token: &u32| {
            let state = self.after(at, *token)?;
            self.walked().states[state.0].iter().map(|s| self.distance[*s]).min()
        };
        let allowed: Vec<(u32, usize)> =
            self.allowed(at).iter().filter_map(|token| Some((*token, left(token)?))).collect();
        let least = allowed.iter().map(|(_, left)| *left).min();
        allowed.into_iter().filter(|(_, left)| Some(*left) == least).map(|(token, _)| token).collect()
    }

    /// The progress behind `token`, if it is allowed.
    pub fn after(&self, at: Progress, token: u32) -> Option<Progress> {
        let mut walked = self.walked();
        let bytes = self.vocabulary.bytes.get(&token)?;
        bytes.iter().try_fold(at.0, |state, byte| self.step(&mut walked, state, *byte)).map(Progress)
    }

    /// Whether `word` begins with the token, or the token with `word`.
    pub fn begins(&self, token: u32, word: &str) -> bool {
        let bytes = self.vocabulary.bytes.get(&token);
        bytes.is_some_and(|b| b.starts_with(word.as_bytes()) || word.as_bytes().starts_with(b))
    }

    /// The tokens that must come next, and the progress behind them: none where the model has a choice.
    ///
    /// They are those that a tokenizer would make of the whole answer: where the next character could be punctuation,
    /// which it might join with the end of the forced text, that end is left to the model.
    pub fn forced(&self, at: Progress) -> Result<(Vec<u32>, Progress)> {
        let encode = |text: &str| -> Result<Vec<u32>> {
            if text.is_empty() {
                return Ok(Vec::new());
            }
            let Vocabulary { tokenizer, file, .. } = &*self.vocabulary;
            Ok(guarded(file, "cannot tokenize", || tokenizer.encode_fast(text, false))?.get_ids().to_vec())
        };
        let (text, joined) = self.forced_text(at);
        let settled = self.vocabulary.settled(&text);
        let joined = joined || settled < text.len();
        let text = &text[..settled];
        let mut tokens = encode(text)?;
        if joined && !tokens.last().is_some_and(|last| self.vocabulary.phrases.contains_key(last)) {
            let keep = text.rfind(|c: char| c.is_ascii_alphanumeric()).map_or(0, |i| i + 1);
            // A blank begins a word of its own: what is before the last one stays.
            let keep = text[keep..].rfind(' ').map_or(keep, |i| keep + i);
            tokens = encode(&text[..keep])?;
        }
        let end = tokens.iter().try_fold(at, |at, token| self.after(at, *token));
        Ok((tokens, end.context("the tokenizer does not write a forced text as it is")?))
    }

    /// The text up to the first place with a choice, and whether punctuation may follow there.
    fn forced_text(&self, at: Progress) -> (String, bool) {
        let mut walked = self.walked();
        let (mut state, mut bytes) = (at.0, Vec::new());
        let joined = loop {
            if walked.states[state].contains(&self.automaton.accept) {
                break false;
            }
            let edges: Vec<(u8, u8)> = walked.states[state]
                .iter()
                .flat_map(|s| self.automaton.edges[*s].iter().map(|(low, high, _)| (*low, *high)))
                .collect();
            match edges.as_slice() {
                [first, rest @ ..] if first.0 == first.1 && rest.iter().all(|e| e == first) => {
                    let Some(next) = self.step(&mut walked, state, first.0) else { break true };
                    bytes.push(first.0);
                    state = next;
                }
                edges => break edges.iter().any(|(low, high)| (*low..=*high).any(|b| !b.is_ascii_alphanumeric())),
            }
        };
        // Only literals of the schema are forced, so this is text; were it not, nothing would be.
        (String::from_utf8(bytes).unwrap_or_default(), joined)
    }
}

fn number(walked: &mut Walked, states: Vec<usize>) -> usize {
    if let Some(known) = walked.numbers.get(&states) {
        return *known;
    }
    walked.states.push(states.clone());
    walked.numbers.insert(states, walked.states.len() - 1);
    walked.states.len() - 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        models::Folder,
        rig::prompts,
        tensor::rng::Stream,
        vlm::vocabulary::{self, SPECIALS},
    };
    use serde_json::json;

    fn vocabulary(phrases: &[&str]) -> (Arc<Vocabulary>, Chat) {
        let texts = [
            prompts::verdict("the red ball is left of the cube", false),
            prompts::edit("too much", "move the \"ball\""),
        ];
        let dir = tempfile::tempdir().unwrap();
        let vocabulary =
            vocabulary::train_with_phrases(texts.iter().cycle().take(40), 330 + SPECIALS.len(), phrases).unwrap();
        vocabulary.write(dir.path()).unwrap();
        let chat = Chat::open(&Folder::from(dir.path())).unwrap();
        (Arc::new(Vocabulary::new(&chat)), chat)
    }

    /// Whether the grammar takes exactly `text`.
    fn accepts(grammar: &Grammar, text: &str) -> bool {
        let mut walked = grammar.walked();
        let end = text.bytes().try_fold(0, |state, byte| grammar.step(&mut walked, state, byte));
        end.is_some_and(|state| walked.states[state].contains(&grammar.automaton.accept))
    }

    #[test]
    fn takes_the_answers_of_the_prompts_and_no_others() {
        let (vocabulary, _) = vocabulary(&[]);
        let check = Grammar::new(&prompts::check_schema(), vocabulary.clone()).unwrap();
        for good in [prompts::verdict("", true), prompts::verdict("a \"quoted\" naïve ☃ 漢 𝄞 reason", false)] {
            assert!(accepts(&check, &good), "{good}");
        }
        let long = prompts::verdict(&"x".repeat(201), false);
        for bad in ["", "{}", "{\"reflection\": \"\", \"verdict\": \"maybe\"}", "{\"reflection\": \"\"", &long] {
            assert!(!accepts(&check, bad), "{bad}");
        }
        let parse = Grammar::new(&prompts::parse_schema(&[]), vocabulary.clone()).unwrap();
        let graph = json!({ "objects": ["ball", "cube"], "relations": [[0, "left of", 1], [1, "x", 10]] });
        let spaced = graph.to_string().replace(':', ": ").replace(',', ", ");
        assert!(accepts(&parse, &spaced), "{spaced}");
        assert!(accepts(&parse, "{\"objects\": [], \"relations\": []}"));
        assert!(!accepts(&parse, "{\"objects\": [], \"relations\": [[0, \"left of\"]]}"));
        let named = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(ToString::to_string).collect();
            Grammar::new(&prompts::parse_schema(&names), vocabulary.clone()).unwrap()
        };
        let two = named(&["red ball", "cube"]);
        assert!(accepts(&two, r#"{"objects": ["red ball", "cube"], "relations": [[1, "above", 0]]}"#));
        for bad in [
            r#"{"objects": ["cube", "red ball"], "relations": []}"#,
            r#"{"objects": ["red ball"], "relations": []}"#,
            r#"{"objects": ["red ball", "cube"], "relations": [[1, "beside", 0]]}"#,
            r#"{"objects": ["red ball", "cube"], "relations": [[2, "above", 0]]}"#,
        ] {
            assert!(!accepts(&two, bad), "{bad}");
        }
        let one = named(&["ring"]);
        assert!(accepts(&one, r#"{"objects": ["ring"], "relations": []}"#));
        assert!(!accepts(&one, r#"{"objects": ["ring"], "relations": [[0, "above", 0]]}"#));
    }

    /// An answer for which `choose` takes a token wherever one is not forced: of what is allowed, what closes, the ids so far.
    fn answer(grammar: &Grammar, mut choose: impl FnMut(&[u32], &[u32], &[u32]) -> u32) -> Vec<u32> {
        let (mut ids, mut at) = (Vec::new(), grammar.begin());
        while !grammar.is_done(at) {
            let (forced, next) = grammar.forced(at).unwrap();
            at = next;
            ids.extend(forced);
            if grammar.is_done(at) {
                break;
            }
            let token = choose(&grammar.allowed(at), &grammar.closing(at), &ids);
            ids.push(token);
            at = grammar.after(at, token).unwrap();
        }
        ids
    }

    #[test]
    fn a_model_that_knows_nothing_still_answers_in_json() {
        let (vocabulary, chat) = vocabulary(&["\", \"verdict\": \""]);
        for schema in [prompts::check_schema(), prompts::reflect_schema(), prompts::parse_schema(&[])] {
            let grammar = Grammar::new(&schema, vocabulary.clone()).unwrap();
            for i in 0..20 {
                let mut stream = Stream::new(1, "constrain", i);
                let ids = answer(&grammar, |allowed, closing, ids| {
                    *stream.choose(if ids.len() > 60 { closing } else { allowed })
                });
                let text = chat.decode(&ids).unwrap();
                assert!(serde_json::from_str::<Value>(&text).is_ok(), "{text}");
                assert!(accepts(&grammar, &text), "{text}");
            }
        }
    }

    #[test]
    fn a_tokenizer_that_makes_no_sense_is_an_error_that_names_its_file() {
        let dir = tempfile::tempdir().unwrap();
        vocabulary::train(["a small red ball"; 3], 300).unwrap().write(dir.path()).unwrap();
        let folder = Folder::from(dir.path());
        let mut tokenizer: Value = folder.json("tokenizer.json").unwrap();
        tokenizer["pre_tokenizer"] = json!({ "type": "FixedLength", "length": 0 });
        std::fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
        let vocabulary = Arc::new(Vocabulary::new(&Chat::open(&folder).unwrap()));
        let forced = |schema: &Value| {
            let grammar = Grammar::new(schema, vocabulary.clone()).unwrap();
            grammar.forced(grammar.begin()).map(|(tokens, _)| tokens)
        };
        let error = forced(&prompts::check_schema()).unwrap_err().to_string();
        assert!(error.ends_with("tokenizer.json cannot tokenize: it makes no sense"), "{error}");
        // Where nothing is forced, nothing is tokenized.
        assert!(forced(&json!({ "type": "boolean" })).unwrap().is_empty());
    }

    #[test]
    fn what_is_forced_is_text_even_if_it_is_written_as_a_special_token() {
        let (vocabulary, chat) = vocabulary(&[]);
        let label = ["<|image_pad|>".to_owned()];
        let grammar = Grammar::new(&prompts::list_schema(&label, &label, 1), vocabulary).unwrap();
        // Whatever does not close a list fills it.
        let ids = answer(&grammar, |allowed, closing, _| {
            *allowed.iter().find(|token| !closing.contains(token)).unwrap_or(&closing[0])
        });
        assert!(!ids.contains(&chat.token("<|image_pad|>").unwrap()));
        assert!(chat.decode(&ids).unwrap().contains("<|image_pad|>"));
    }

    #[test]
    fn what_is_forced_is_tokenized_as_in_a_whole_answer() {
        const HEAD: &str = "{\"reflection\": \"";
        let answers = [HEAD, "\", \"verdict\": \"", "\"}"];
        for phrases in [&[][..], &answers, &answers[1..], &["\", \"verdict\": \"yes\"}", "reflection\": \"the"]] {
            let (vocabulary, chat) = vocabulary(phrases);
            let grammar = Grammar::new(&prompts::check_schema(), vocabulary).unwrap();
            for answer in [prompts::verdict("", true), prompts::verdict("the red ball is left of the cube", false)] {
                let ids = chat.encode(&answer).unwrap();
                assert_eq!(chat.decode(&ids).unwrap(), answer);
                let (mut at, mut seen) = (grammar.begin(), 0);
                while !grammar.is_done(at) {
                    let (forced, next) = grammar.forced(at).unwrap();
                    assert_eq!(forced, ids[seen..seen + forced.len()], "{answer}");
                    (at, seen) = (next, seen + forced.len());
                    if let Some(token) = ids.get(seen) {
                        at = grammar.after(at, *token).unwrap();
                        seen += 1;
                    }
                }
                assert_eq!(seen, ids.len());
            }
            let (head, _) = grammar.forced(grammar.begin()).unwrap();
            assert!(HEAD.starts_with(&chat.decode(&head).unwrap()));
            assert!(phrases.len() < 3 || head.len() == 1);
        }
    }
}
