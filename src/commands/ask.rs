//! What is asked for: prompts from the command line, a file or stdin, and scene graphs.

use super::show::printable;
use crate::{
    cli::Asked,
    io::{read_file, read_whole},
    rig::{
        roles::{Claim, Target},
        vlm_roles::Critic,
    },
    scene::{
        graph::{LARGEST, Object, Relation, SceneGraph},
        laion_sg::Record,
        parse::{MAX_CHARS, ParseError, parse},
        relation::{contradictions, too_large},
        tabletop::caption::plain,
        unusual::{mistake, named},
    },
    usage,
};
use anyhow::{Context, Result};
use serde_json::{Value, from_slice};
use std::path::Path;

const MAX_FILE: u64 = 64 << 20;

/// One thing that is asked for.
pub enum Ask {
    /// Its claims are known.
    Target(Target),
    /// Words that the grammar does not cover: the VLM has to find the claims.
    Words { prompt: String, strict: bool },
}

/// Reads everything that is asked for. `strict` says that the models know the words of the tabletop world only, so that
/// another word is a mistake.
pub fn read(asked: &Asked, strict: bool) -> Result<Vec<Ask>> {
    if let Some(path) = &asked.graph {
        let graphs = graphs(path)?;
        let n = graphs.len();
        let place = |i: usize| match n {
            1 => path.display().to_string(),
            n => format!("{}, graph {} of {n}", path.display(), i + 1),
        };
        let ask = |graph: Result<SceneGraph>| from_graph(graph?, strict);
        return graphs.into_iter().enumerate().map(|(i, graph)| ask(graph).with_context(|| place(i))).collect();
    }
    let (name, bytes) = match (&asked.prompt, &asked.prompt_file) {
        (Some(prompt), _) if prompt != "-" => return Ok(vec![understand(prompt, strict)?]),
        (Some(_), _) => ("stdin".to_owned(), read_whole(std::io::stdin(), "stdin", MAX_FILE)?),
        (None, Some(path)) => (path.display().to_string(), read_file(path, MAX_FILE)?),
        (None, None) => usage!("say what to draw: --prompt, --prompt-file, --graph or --from"),
    };
    prompts(&name, bytes, strict)
}

/// The prompts of a text from `name`, one a line.
fn prompts(name: &str, bytes: Vec<u8>, strict: bool) -> Result<Vec<Ask>> {
    let text = String::from_utf8(bytes).with_context(|| format!("{name} is no UTF-8 text"))?;
    // A byte order mark is no harm.
    let lines = text.strip_prefix('\u{feff}').unwrap_or(&text).lines().enumerate();
    let asks: Vec<Ask> = lines
        .filter(|(_, line)| !line.trim().is_empty())
        .map(|(i, line)| understand(line, strict).with_context(|| format!("{name}, line {}", i + 1)))
        .collect::<Result<_>>()?;
    if asks.is_empty() {
        usage!("there are no prompts to draw in {name}");
    }
    Ok(asks)
}

/// A prompt's claims, by the grammar.
pub fn understand(prompt: &str, strict: bool) -> Result<Ask> {
    let length = prompt.trim().chars().count();
    if length > MAX_CHARS {
        usage!("the prompt has {length} characters; at most {MAX_CHARS} are read");
    }
    // A line may end a sentence. Where it cannot, the prompt was only wrapped.
    let unwrapped = prompt.split_whitespace().collect::<Vec<_>>().join(" ");
    let prompt = if parse(&unwrapped).is_ok() { &unwrapped } else { prompt.trim() };
    let words = || Ok(Ask::Words { prompt: prompt.to_owned(), strict });
    match parse(prompt) {
        Ok(graph) => {
            if let Some(why) = too_large(&graph).filter(|_| strict) {
                usage!("no picture can show this: {why}");
            }
            Ok(Ask::Target(target(prompt, &graph)))
        }
        Err(ParseError::Empty) => usage!("the prompt is empty"),
        Err(error @ ParseError::Contradiction(_)) => usage!("{error}"),
        Err(error) if strict => match mistake(prompt, error) {
            Some(mistake) => usage!("{mistake}"),
            None => words(),
        },
        Err(_) => words(),
    }
}

/// The target, after the VLM has found the claims of what the grammar could not read; `say` hears which. With `only` nothing
/// else may be in the picture.
pub fn resolve(ask: Ask, critic: &Critic, only: bool, say: &dyn Fn(&str)) -> Result<Target> {
    let mut target = match ask {
        Ask::Target(target) => target,
        Ask::Words { prompt, strict } => {
            // What is named the grammar knows, though not what is said of it.
            let graph = critic.parse(&prompt, &if strict { named(&prompt) } else { Vec::new() })?;
            let (target, told) = found(&prompt, graph);
            say(&printable(&told));
            target
        }
    };
    if let Some(twice) = target.said_twice() {
        say(&printable(&format!(
            "several things in \"{}\" are called \"{twice}\": the Checker is asked for each by these words, and does not count them",
            target.prompt
        )));
    }
    // A recipe's may say it already.
    target.claims.retain(|claim| !matches!(claim, Claim::Only(_)));
    Ok(if only { target.and_nothing_else() } else { target })
}

/// The target by the graph that the VLM read in a prompt, and what to say of it. Relations that contradict each other are not
/// asked for, as no round would end with them; the prompt itself is drawn, as the VLM may have misread it.
fn found(prompt: &str, mut graph: SceneGraph) -> (Target, String) {
    let impossible = contradictions(&graph).into_iter().next();
    if impossible.is_some() {
        graph.relations.clear();
    }
    let target = if impossible.is_some() { Target::new(prompt, &graph) } else { target(prompt, &graph) };
    let claims: Vec<String> = target.claims.iter().map(ToString::to_string).collect();
    let told = match (target.claims.is_empty(), graph.relations.is_empty()) {
        (_, true) if impossible.is_some() => format!(
            "as the VLM reads \"{prompt}\", no picture can show it: {}; only its objects are checked: {}",
            impossible.unwrap_or_default(),
            claims.join("; ")
        ),
        (true, _) => format!("no object and no relation was found in \"{prompt}\": it is drawn, but not checked"),
        (_, true) => {
            format!("no relation was found in \"{prompt}\": only its objects are checked: {}", claims.join("; "))
        }
        _ => format!("the VLM reads \"{prompt}\" as: {}", claims.join("; ")),
    };
    (target, told)
}

/// LAION-SG's records, one or a list, or plain scene graphs likewise; a record may be an error of its own.
fn graphs(path: &Path) -> Result<Vec<Result<SceneGraph>>> {
    let shown = path.display();
    let bytes = read_file(path, MAX_FILE)?;
    // A byte order mark is no harm.
    let json = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&bytes);
    let read = || -> serde_json::Result<Vec<Result<SceneGraph>>> {
        // What the first of them is, all are: serde names the place of a mistake only if it knows what it reads.
        let value: Value = from_slice(json)?;
        let first = value.as_array().map_or(Some(&value), |all| all.first());
        let is_record = first.is_some_and(|one| one.get("items").is_some());
        Ok(match (value.is_array(), is_record) {
            (true, true) => from_slice::<Vec<Record>>(json)?.iter().map(whole).collect(),
            (true, false) => from_slice::<Vec<SceneGraph>>(json)?.into_iter().map(Ok).collect(),
            (false, true) => vec![whole(&from_slice(json)?)],
            (false, false) => vec![Ok(from_slice(json)?)],
        })
    };
    match read() {
        Ok(graphs) if graphs.is_empty() => usage!("{shown} holds no scene graph"),
        Ok(graphs) => Ok(graphs),
        Err(error) => {
            usage!("{shown} is neither a LAION-SG record, nor a scene graph, nor a list of either: {error}")
        }
    }
}

/// The graph of a record whose relations are all between its items.
fn whole(record: &Record) -> Result<SceneGraph> {
    let dangling = record.dangling().map(|t| format!("{} {:?} {}", t.item1, t.relation, t.item2));
    let dangling = dangling.collect::<Vec<_>>().join(", ");
    if !dangling.is_empty() {
        usage!("relations that name an item which is not there: {dangling}");
    }
    Ok(record.graph())
}

fn from_graph(mut graph: SceneGraph, strict: bool) -> Result<Ask> {
    let (objects, relations) = (graph.objects.len(), graph.relations.len());
    if objects.max(relations) > LARGEST {
        usage!("a scene graph of {objects} objects and {relations} relations; at most {LARGEST} of each are drawn");
    }
    if let Err(error) = graph.validate() {
        usage!("{error}");
    }
    if strict {
        graph = in_known_words(&graph)?;
    }
    let why = contradictions(&graph).into_iter().next();
    if let Some(why) = why.or_else(|| too_large(&graph).filter(|_| strict)) {
        usage!("no picture can show this: {why}");
    }
    let prompt = graph.triple_text();
    if prompt.is_empty() {
        usage!("a scene graph without objects says nothing to draw");
    }
    Ok(Ask::Target(target(&prompt, &graph)))
}

/// What a prompt with this graph asks for, with the plainest words for it if the tabletop world has any: a Diffuser that knows
/// no others draws wrong, more often than not, what it is told in words that it was not trained on.
fn target(prompt: &str, graph: &SceneGraph) -> Target {
    let target = Target::new(prompt, graph);
    let words = plain(graph);
    let counts = |graph: &SceneGraph| (graph.objects.len(), graph.relations.len());
    let is_said = parse(&words).is_ok_and(|read| counts(&read) == counts(graph));
    if is_said { target.drawn_as(words) } else { target }
}

/// The graph in the words of the tabletop world, by the grammar of prompts.
fn in_known_words(graph: &SceneGraph) -> Result<SceneGraph> {
    let read = |text: &str| match parse(text) {
        Ok(read) => Ok(read),
        Err(error) => usage!("{error}"),
    };
    let object = |object: &Object| match <[Object; 1]>::try_from(read(&object.phrase())?.objects) {
        Ok([known]) => Ok(known),
        Err(_) => usage!("\"{}\" is more than one object", object.phrase()),
    };
    let relation = |relation: &Relation| {
        let read = read(&format!("a ball {} a cube", relation.predicate))?;
        match <[Relation; 1]>::try_from(read.relations) {
            Ok([known]) => Ok(Relation { predicate: known.predicate, ..*relation }),
            Err(_) => usage!("\"{}\" is not one relation", relation.predicate),
        }
    };
    Ok(SceneGraph {
        objects: graph.objects.iter().map(object).collect::<Result<_>>()?,
        relations: graph.relations.iter().map(relation).collect::<Result<_>>()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_of_a_file_are_told_by_its_name_and_read_whole_or_not_at_all() {
        let marked = "\u{feff}a red ball\r\n\n a blue cube \n";
        let told: Vec<String> = prompts("p.txt", marked.into(), true)
            .unwrap()
            .into_iter()
            .map(|ask| match ask {
                Ask::Target(target) => target.prompt,
                Ask::Words { prompt, .. } => panic!("{prompt:?}"),
            })
            .collect();
        assert_eq!(told, ["a red ball", "a blue cube"]);
        let error = |bytes: &[u8]| format!("{:#}", prompts("p.txt", bytes.to_vec(), true).err().unwrap());
        let wrong = error(b"a red ball\n\na red giraffe left of a blue cube");
        assert!(wrong.starts_with("p.txt, line 3: unknown shape"), "{wrong}");
        assert!(error(b"\n").ends_with("in p.txt") && error(b"\xff").starts_with("p.txt is no UTF-8"));
        assert_eq!(read_whole(&b"ball"[..], "stdin", 4).unwrap(), b"ball");
        assert!(read_whole(&b"balls"[..], "stdin", 4).unwrap_err().to_string().contains("more than the 4 bytes"));
    }

    #[test]
    fn what_the_vlm_read_is_told_and_relations_that_contradict_each_other_are_not_asked_for() {
        let found = |labels: &[&str], relations: &[(usize, &str, usize)]| {
            let objects = labels.iter().map(|label| Object::new(*label, Vec::new())).collect();
            let relation = |&(subject, predicate, object): &(usize, &str, usize)| Relation {
                subject,
                predicate: predicate.into(),
                object,
            };
            found("so it is", SceneGraph { objects, relations: relations.iter().map(relation).collect() })
        };
        let told = |labels, relations| found(labels, relations).1;
        let nothing = "no object and no relation was found in \"so it is\": it is drawn, but not checked";
        assert_eq!(told(&[], &[]), nothing);
        let objects = "no relation was found in \"so it is\": only its objects are checked: cat; dog";
        assert_eq!(told(&["cat", "dog"], &[]), objects);
        let (target, all) = found(&["cat", "dog"], &[(0, "left of", 1)]);
        assert_eq!(all, "the VLM reads \"so it is\" as: cat; dog; cat left of dog");
        assert_eq!((target.prompt.as_str(), target.claims.len()), ("so it is", 3));
        let (target, told) = found(&["cat", "dog"], &[(0, "left of", 1), (1, "left of", 0)]);
        assert!(told.starts_with("as the VLM reads \"so it is\", no picture can show it: "), "{told}");
        assert!(told.ends_with("only its objects are checked: cat; dog") && target.claims.len() == 2, "{told}");
    }

    #[test]
    fn what_the_world_has_no_room_for_is_a_mistake_with_its_models_alone() {
        let large = "a large ball inside a small ring";
        let error = understand(large, true).err().unwrap().to_string();
        assert!(error.contains("does not fit"), "{error}");
        assert!(matches!(understand(large, false), Ok(Ask::Target(_))));
        assert!(understand("a red blue ball", true).err().unwrap().to_string().contains("both red and blue"));
        let unusual = "There is a red ball. A blue cube has it to its left.";
        assert!(matches!(understand(unusual, true), Ok(Ask::Words { strict: true, .. })));
        let unknown = |prompt: &str| understand(prompt, true).err().unwrap().to_string();
        assert!(unknown("a red ball next to a giraffe").contains("unknown word \"giraffe\""));
        assert!(unknown("to the left").contains("ends where an object"));
        assert!(matches!(understand("a red ball next to a giraffe", false), Ok(Ask::Words { .. })));
    }

    #[test]
    fn models_that_know_few_words_draw_from_the_plainest() {
        let (asked, plain) = ("a blue cube with a tiny red ball to its left", "a small red ball left of a blue cube");
        let target = |prompt: &str| super::target(prompt, &parse(prompt).unwrap());
        assert_eq!((target(asked).prompt.as_str(), target(asked).words()), (asked, plain));
        assert_eq!(target(plain).drawn_as, None);
        // What the VLM reads into a prompt may be no words of the world, or what nothing can show.
        let things = |labels: &[&str]| labels.iter().map(|label| Object::new(*label, Vec::new())).collect();
        let read = |labels: &[&str], relations: &[(usize, usize)]| {
            let relation = |(subject, object)| Relation { subject, predicate: "left of".into(), object };
            SceneGraph { objects: things(labels), relations: relations.iter().copied().map(relation).collect() }
        };
        assert_eq!(found("so", read(&["ball", "cube"], &[(0, 1)])).0.words(), "a ball left of a cube");
        assert_eq!(found("so", read(&["giraffe"], &[])).0.words(), "so");
        assert_eq!(found("so", read(&["ball", "cube"], &[(0, 1), (1, 0)])).0.words(), "so");
    }

    #[test]
    fn models_that_know_few_words_are_told_in_those() {
        let told = |label: &str, predicate: &str, strict| {
            let objects = vec![Object::new(label, vec!["big".into()]), Object::new("cube", Vec::new())];
            let relations = vec![Relation { subject: 0, predicate: predicate.into(), object: 1 }];
            match from_graph(SceneGraph { objects, relations }, strict) {
                Ok(Ask::Target(target)) => target.prompt,
                Ok(Ask::Words { prompt, .. }) => panic!("{prompt}"),
                Err(error) => error.to_string(),
            }
        };
        assert_eq!(told("sphere", "to the left of", true), "large ball left of cube");
        assert_eq!(told("giraffe", "chasing", false), "big giraffe chasing cube");
        for (label, predicate, expected) in [
            ("giraffe", "above", "unknown shape \"giraffe\""),
            ("ball", "chasing", "\"chasing\" where a relation"),
            ("ball and a ring", "above", "\"big ball and a ring\" is more than one object"),
            ("ball", "and", "\"and\" is not one relation"),
        ] {
            let error = told(label, predicate, true);
            assert!(error.contains(expected), "{error}");
        }
    }
}
