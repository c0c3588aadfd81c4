//! A JSON schema as an automaton over the bytes of its values.
//!
//! The schemas in use are closed (nothing nests without end), so their values, written in the one way that
//! [`crate::rig::prompts`] writes them (`", "` and `": "` between parts, properties in the schema's order), are a regular
//! language.

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::collections::BTreeSet;

/// A nondeterministic automaton over bytes.
#[derive(Default)]
pub(super) struct Automaton {
    /// For each state the byte ranges that lead on.
    pub(super) edges: Vec<Vec<(u8, u8, usize)>>,
    /// For each state those that are reached for nothing.
    free: Vec<Vec<usize>>,
    /// The state behind a whole value.
    pub(super) accept: usize,
}

impl Automaton {
    /// Where a value begins.
    pub(super) const START: usize = 0;

    /// That of the values of `schema`.
    pub(super) fn new(schema: &Value) -> Result<Self> {
        let mut automaton = Self::default();
        let start = automaton.state();
        automaton.accept = automaton.schema(schema, start)?;
        Ok(automaton)
    }

    fn state(&mut self) -> usize {
        self.edges.push(Vec::new());
        self.free.push(Vec::new());
        self.edges.len() - 1
    }

    fn range(&mut self, from: usize, low: u8, high: u8) -> usize {
        let to = self.state();
        self.edges[from].push((low, high, to));
        to
    }

    fn literal(&mut self, from: usize, text: &str) -> usize {
        text.bytes().fold(from, |at, byte| self.range(at, byte, byte))
    }

    /// One of several parts, each of which leads from the first state to the last.
    fn any(&mut self, ends: Vec<usize>) -> usize {
        let to = self.state();
        for end in ends {
            self.free[end].push(to);
        }
        to
    }

    /// One character of a JSON string.
    fn character(&mut self, from: usize) -> usize {
        const TAIL: (u8, u8) = (0x80, 0xBF);
        // The well-formed sequences of UTF-8, without control characters, quote and backslash.
        const SEQUENCES: [&[(u8, u8)]; 11] = [
            &[(0x20, 0x21)],
            &[(0x23, 0x5B)],
            &[(0x5D, 0x7E)],
            &[(0xC2, 0xDF), TAIL],
            &[(0xE0, 0xE0), (0xA0, 0xBF), TAIL],
            &[(0xE1, 0xEC), TAIL, TAIL],
            &[(0xED, 0xED), (0x80, 0x9F), TAIL],
            &[(0xEE, 0xEF), TAIL, TAIL],
            &[(0xF0, 0xF0), (0x90, 0xBF), TAIL, TAIL],
            &[(0xF1, 0xF3), TAIL, TAIL, TAIL],
            &[(0xF4, 0xF4), (0x80, 0x8F), TAIL, TAIL],
        ];
        let mut ends: Vec<usize> = SEQUENCES
            .iter()
            .map(|sequence| sequence.iter().fold(from, |at, (low, high)| self.range(at, *low, *high)))
            .collect();
        let escape = self.range(from, b'\\', b'\\');
        ends.extend(br#""\/bfnrt"#.map(|c| self.range(escape, c, c)));
        self.any(ends)
    }

    /// The values of `schema`, beginning at `from`; the result is where they end.
    fn schema(&mut self, schema: &Value, from: usize) -> Result<usize> {
        if let Some(value) = schema.get("const") {
            return Ok(self.literal(from, &value.to_string()));
        }
        if let Some(values) = schema.get("enum").and_then(Value::as_array) {
            ensure!(!values.is_empty(), "an enum without values in the schema");
            let ends = values.iter().map(|value| self.literal(from, &value.to_string())).collect();
            return Ok(self.any(ends));
        }
        let count = |key: &str| schema.get(key).and_then(Value::as_u64).map(|n| n as usize);
        match schema.get("type").and_then(Value::as_str) {
            Some("object") => self.object(schema, from),
            Some("array") => self.array(schema, from),
            Some("string") => {
                let open = self.literal(from, "\"");
                let end = self.repeat(open, count("minLength").unwrap_or(0), count("maxLength"), |this, at, _| {
                    Ok(this.character(at))
                })?;
                Ok(self.literal(end, "\""))
            }
            Some("integer") => {
                let bound = |key| schema.get(key).and_then(Value::as_i64);
                let (low, high) = bound("minimum").zip(bound("maximum")).context("an integer needs its bounds")?;
                ensure!(low <= high && high - low < 1000, "the bounds of an integer are too far apart");
                let ends = (low..=high).map(|n| self.literal(from, &n.to_string())).collect();
                Ok(self.any(ends))
            }
            Some("boolean") => {
                let ends = ["true", "false"].map(|word| self.literal(from, word)).to_vec();
                Ok(self.any(ends))
            }
            _ => bail!("the schema {schema} is not supported"),
        }
    }

    fn object(&mut self, schema: &Value, from: usize) -> Result<usize> {
        let properties = schema.get("properties").and_then(Value::as_object).context("an object needs properties")?;
        let required: Vec<&str> =
            schema.get("required").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str).collect();
        ensure!(properties.keys().eq(&required), "all properties of an object must be required, in order");
        let mut at = self.literal(from, "{");
        for (i, (name, value)) in properties.iter().enumerate() {
            let separator = if i == 0 { "" } else { ", " };
            at = self.literal(at, &format!("{separator}{}: ", Value::from(name.as_str())));
            at = self.schema(value, at)?;
        }
        Ok(self.literal(at, "}"))
    }

    fn array(&mut self, schema: &Value, from: usize) -> Result<usize> {
        let open = self.literal(from, "[");
        let comma = |this: &mut Self, at: usize, i: usize| if i == 0 { at } else { this.literal(at, ", ") };
        let end = if let Some(items) = schema.get("prefixItems").and_then(Value::as_array) {
            items.iter().enumerate().try_fold(open, |at, (i, item)| {
                let at = comma(self, at, i);
                self.schema(item, at)
            })?
        } else {
            let items = schema.get("items").context("an array needs items")?;
            let count = |key: &str| schema.get(key).and_then(Value::as_u64).map(|n| n as usize);
            let most = count("maxItems").context("an array needs maxItems")?;
            self.repeat(open, count("minItems").unwrap_or(0), Some(most), |this, at, i| {
                let at = comma(this, at, i);
                this.schema(items, at)
            })?
        };
        Ok(self.literal(end, "]"))
    }

    /// `part` from `least` to `most` times; the closure gets the state and the number of the repetition.
    fn repeat(
        &mut self,
        from: usize,
        least: usize,
        most: Option<usize>,
        mut part: impl FnMut(&mut Self, usize, usize) -> Result<usize>,
    ) -> Result<usize> {
        let mut at = from;
        for i in 0..least {
            at = part(self, at, i)?;
        }
        let Some(most) = most else {
            let hub = self.any(vec![at]);
            let end = part(self, hub, least)?;
            self.free[end].push(hub);
            return Ok(self.any(vec![hub]));
        };
        ensure!(least <= most && most <= 4096, "a repetition of {least} to {most} is out of bounds");
        let mut ends = vec![at];
        for i in least..most {
            at = part(self, at, i)?;
            ends.push(at);
        }
        Ok(self.any(ends))
    }

    /// `states` and all that they reach for nothing, in order.
    pub(super) fn closure(&self, states: impl IntoIterator<Item = usize>) -> Vec<usize> {
        let mut seen = BTreeSet::new();
        let mut todo: Vec<usize> = states.into_iter().collect();
        while let Some(state) = todo.pop() {
            if seen.insert(state) {
                todo.extend(&self.free[state]);
            }
        }
        seen.into_iter().collect()
    }

    /// The fewest bytes from each state to the end of a value.
    pub(super) fn distances(&self) -> Vec<usize> {
        let mut distance = vec![usize::MAX; self.edges.len()];
        distance[self.accept] = 0;
        loop {
            let mut changed = false;
            // Most edges lead to states that were made later, so this settles in few rounds.
            for state in (0..self.edges.len()).rev() {
                let free = self.free[state].iter().map(|to| distance[*to]);
                let paid = self.edges[state].iter().map(|(_, _, to)| distance[*to].saturating_add(1));
                let least = free.chain(paid).min().unwrap_or(usize::MAX);
                if least < distance[state] {
                    distance[state] = least;
                    changed = true;
                }
            }
            if !changed {
                return distance;
            }
        }
    }
}
