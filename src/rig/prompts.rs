//! What is asked of the VLM, in one wording for every model: real Qwen3-VL checkpoints are asked in these words, and the
//! shipped small one is trained on them.
//!
//! The picture always comes first in the user's turn and the words after it, so that a picture's keys and values are
//! computed once and shared by all its questions. Every answer is one JSON object, decoded under a constraint:
//!
//! | asked | answer |
//! |---|---|
//! | a claim ([`check`]) | `{"reflection": "large red ball 70 45, small blue cube 25 40", "verdict": "no"}` |
//! | an edit ([`reflect`]) | `{"reflection": "too much blue ring", "edit": "remove the blue ring"}` |
//! | the graph of a prompt ([`parse`]) | `{"objects": ["large red ball", ..], "relations": [[0, "left of", 1], ..]}` |
//! | the graph of a picture ([`list`]) | `{"scene_graph": [["ball", "left of", "cube"], ..], "object_list": [..], "predicate_list": [..]}` |
//!
//! The Checker looks before it decides: it first writes what the picture has of the claim and where, then the verdict. A
//! verdict in one word from nothing is learned late and is a guess more often; what was seen is also what the Actor needs.
//! The Actor, in turn, first sums up all that is wrong, and then mends one thing.

use super::roles::{Claim, Verdict};
use crate::scene::relation::Spatial;
use serde_json::{Value, json};

/// The words of a verdict: P(yes) is read from the logits where the answer chooses between them.
pub const VERDICTS: [&str; 2] = ["yes", "no"];

/// The question about one claim.
pub fn check(claim: &Claim) -> String {
    format!(
        "Does the picture show \"{claim}\"? Answer in JSON with \"reflection\" (what is seen of it, and where: x and y in \
         percent) and \"verdict\" (yes or no)."
    )
}

/// The answer to [`check`].
pub fn verdict(reflection: &str, yes: bool) -> String {
    format!("{{\"reflection\": {}, {VERDICT}{}\"}}", Value::from(reflection), VERDICTS[usize::from(!yes)])
}

const VERDICT: &str = "\"verdict\": \"";

/// An answer to [`check`] up to the word that decides.
pub fn undecided(answer: &str) -> &str {
    answer.rfind(VERDICT).map_or("", |at| &answer[..at + VERDICT.len()])
}

/// The JSON schema of an answer to [`check`].
pub fn check_schema() -> Value {
    json!({
        "type": "object",
        "properties": { "reflection": { "type": "string", "maxLength": 200 }, "verdict": { "enum": VERDICTS } },
        "required": ["reflection", "verdict"],
        "additionalProperties": false
    })
}

/// The question for the next edit: the prompt, what the Checker found wrong, and the edits made so far.
pub fn reflect(prompt: &str, verdicts: &[Verdict], earlier: &[&str]) -> String {
    let mut text = format!("The picture should show: {}\nWrong:", prompt.trim());
    for verdict in verdicts.iter().filter(|v| !v.yes) {
        text += &format!("\n- {}", verdict.claim);
        if !verdict.reflection.is_empty() {
            text += &format!(" ({})", verdict.reflection);
        }
    }
    if !earlier.is_empty() {
        text += "\nEdits so far:";
        for edit in earlier {
            text += &format!("\n- {edit}");
        }
    }
    text + "\nWhat one edit makes it right? Answer in JSON with \"reflection\" (what is missing, too much or misplaced) and \
            \"edit\"."
}

/// The answer to [`reflect`].
pub fn edit(reflection: &str, instruction: &str) -> String {
    format!("{{\"reflection\": {}, \"edit\": {}}}", Value::from(reflection), Value::from(instruction))
}

/// The JSON schema of an answer to [`reflect`].
pub fn reflect_schema() -> Value {
    json!({
        "type": "object",
        "properties": {
            "reflection": { "type": "string", "maxLength": 240 },
            "edit": { "type": "string", "minLength": 1, "maxLength": 200 }
        },
        "required": ["reflection", "edit"],
        "additionalProperties": false
    })
}

/// The question, without a picture, for the scene graph of a prompt that the grammar does not cover.
pub fn parse(prompt: &str) -> String {
    format!(
        "List the objects of this text with their attributes, and how they are placed to each other: \"{}\" Answer in \
         JSON with \"objects\" and \"relations\" ([subject, relation, object] with the objects' numbers).",
        prompt.trim()
    )
}

/// The JSON schema of an answer to [`parse`]: any, or where the objects of the text are known, between these alone.
pub fn parse_schema(named: &[String]) -> Value {
    let (number, predicate, objects, most) = if named.is_empty() {
        let objects = json!({ "type": "array", "items": { "type": "string" }, "maxItems": 16 });
        (json!({ "type": "integer", "minimum": 0, "maximum": 99 }), json!({ "type": "string" }), objects, 32)
    } else {
        let each: Vec<Value> = named.iter().map(|name| json!({ "const": name })).collect();
        let numbers: Vec<usize> = (0..named.len()).collect();
        let objects = json!({ "type": "array", "prefixItems": each, "items": false });
        let predicates = Spatial::ALL.map(Spatial::name);
        (json!({ "enum": numbers }), json!({ "enum": predicates }), objects, 4 * (named.len() - 1))
    };
    let relation = json!({ "type": "array", "prefixItems": [number, predicate, number], "items": false });
    json!({
        "type": "object",
        "properties": {
            "objects": objects,
            "relations": { "type": "array", "items": relation, "maxItems": most }
        },
        "required": ["objects", "relations"],
        "additionalProperties": false
    })
}

/// The question for what a picture shows in given words, as LAION-SG's authors put it to their judge (their
/// `test/test_iou.py`): three lists, whose words are those of the graph that was asked for.
pub fn list(objects: &[String], predicates: &[String]) -> String {
    format!(
        "What of this does the picture show? Objects: {}. Relations: {}. Answer in JSON with \"scene_graph\" (the triples \
         [subject, relation, object] that are to be seen), \"object_list\" and \"predicate_list\", in these words alone.",
        objects.join("; "),
        predicates.join("; ")
    )
}

/// The JSON schema of an answer to [`list`] with at most `most` triples. Without words a list stays empty.
pub fn list_schema(objects: &[String], predicates: &[String], most: usize) -> Value {
    let words = |words: &[String]| match words.is_empty() {
        true => json!({ "type": "array", "maxItems": 0 }),
        false => json!({ "type": "array", "items": { "enum": words }, "maxItems": words.len() }),
    };
    let triples = match objects.is_empty() || predicates.is_empty() {
        true => json!({ "type": "array", "maxItems": 0 }),
        false => json!({
            "type": "array",
            "items": {
                "type": "array",
                "prefixItems": [{ "enum": objects }, { "enum": predicates }, { "enum": objects }],
                "items": false
            },
            "maxItems": most
        }),
    };
    json!({
        "type": "object",
        "properties": { "scene_graph": triples, "object_list": words(objects), "predicate_list": words(predicates) },
        "required": ["scene_graph", "object_list", "predicate_list"],
        "additionalProperties": false
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn relation() -> Claim {
        Claim::Relation {
            subject: "large red ball".into(),
            relation: "left of".into(),
            object: "small blue cube".into(),
        }
    }

    #[test]
    fn answers_are_what_their_schemas_say() {
        for (text, schema) in [
            (verdict("", true), check_schema()),
            (verdict("a \"quoted\" reason", false), check_schema()),
            (edit("misplaced red ball", "move the red ball"), reflect_schema()),
        ] {
            let answer: Value = serde_json::from_str(&text).unwrap();
            let required = schema["required"].as_array().unwrap();
            let keys: Vec<Value> = answer.as_object().unwrap().keys().map(|k| Value::from(k.as_str())).collect();
            assert_eq!(&keys, required, "the keys come in the schema's order");
        }
        assert_eq!(undecided(&verdict("x", false)), "{\"reflection\": \"x\", \"verdict\": \"");
    }

    #[test]
    fn only_what_failed_is_put_to_the_actor() {
        let verdicts = [
            Verdict { claim: Claim::Object("large red ball".into()), yes: true, p_yes: 0.9, reflection: String::new() },
            Verdict { claim: relation(), yes: false, p_yes: 0.1, reflection: "it is right of it".into() },
        ];
        let text = reflect("a prompt ", &verdicts, &["move it"]);
        assert_eq!(
            text,
            "The picture should show: a prompt\nWrong:\n- large red ball left of small blue cube (it is right of it)\n\
             Edits so far:\n- move it\nWhat one edit makes it right? Answer in JSON with \"reflection\" (what is \
             missing, too much or misplaced) and \"edit\"."
        );
    }

    #[test]
    fn a_claim_is_asked_for_in_the_papers_triple_form() {
        assert!(check(&relation()).starts_with("Does the picture show \"large red ball left of small blue cube\"?"));
    }
}
