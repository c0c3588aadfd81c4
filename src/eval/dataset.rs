//! What is evaluated on: one [`Sample`] a prompt, from LAION-SG's files or from the tabletop world.

use super::{
    flaws::Flaws,
    places::is_spatial,
    record::Entry,
    records::{Records, Spot},
    wording::Wording,
};
use crate::{
    io,
    rig::roles::Target,
    scene::{
        graph::SceneGraph,
        tabletop::{split::Split, tasks},
    },
    tensor::rng::Stream,
    usage,
};
use anyhow::{Context, Result};
use serde::Serialize;
use std::{
    collections::BinaryHeap,
    fs::{self, File},
    io::{BufReader, Read},
    path::{Path, PathBuf},
};

/// The name of the tabletop world as a data set.
pub const TABLETOP: &str = "tabletop";
/// How many of its samples, or edits, are taken where nobody says.
pub const LIMIT: usize = 500;
/// How many of them are taken at most: they are all held in memory before the first is drawn.
pub const MOST: usize = 100_000;

/// A prompt, and the scene graph that a picture of it is measured against.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Sample {
    /// Its place in the data set before anything is filtered; seeds follow it.
    pub index: u64,
    pub id: String,
    pub dataset: &'static str,
    pub split: String,
    pub prompt: String,
    /// What is drawn from instead of the prompt, if anything.
    pub drawn_as: Option<String>,
    pub graph: SceneGraph,
}

impl Sample {
    /// What a picture of it is held to; `only` adds that it shows nothing else.
    pub fn target(&self, only: bool) -> Target {
        let target = Target::new(self.prompt.clone(), &self.graph);
        let target = match &self.drawn_as {
            Some(words) => target.drawn_as(words.clone()),
            None => target,
        };
        if only { target.and_nothing_else() } else { target }
    }
}

/// Which samples of a data set.
#[derive(Clone, Debug)]
pub struct Selection {
    pub wording: Wording,
    /// Samples with fewer relations are left out; the data set's own loader leaves out those with none.
    pub min_relations: usize,
    pub min_objects: usize,
    /// Unless empty: samples with none of these relations are left out.
    pub predicates: Vec<String>,
    /// Leaves out relations that are not spatial.
    pub spatial_only: bool,
    pub limit: Option<usize>,
    /// With a limit: a random subset by this seed instead of the first.
    pub subset: Option<u64>,
    /// Part `shard.0` of `shard.1`, counted from 1, of what the rest selects.
    pub shard: (usize, usize),
}

impl Selection {
    fn admits(&self, graph: &SceneGraph) -> bool {
        let mut relations = graph.relations.iter();
        graph.relations.len() >= self.min_relations
            && graph.objects.len() >= self.min_objects
            && (self.predicates.is_empty() || relations.any(|r| self.predicates.contains(&r.predicate)))
    }

    /// Whether the shard has the `place`th, from 0, of what the rest selects.
    fn in_shard(&self, place: usize) -> bool {
        let (part, parts) = self.shard;
        place % parts == part - 1
    }

    /// Those of the shard, of all that the rest selects.
    fn shard<T>(&self, samples: Vec<T>) -> Vec<T> {
        (0..).zip(samples).filter(|(place, _)| self.in_shard(*place)).map(|(_, sample)| sample).collect()
    }

    /// What a picture is measured against; `None` if the sample is left out.
    fn graph(&self, graph: SceneGraph) -> Option<SceneGraph> {
        let graph = if self.spatial_only { spatial(graph) } else { graph };
        self.admits(&graph).then_some(graph)
    }
}

/// The samples of a run, in order. Of a file only their places are held, and each is read when its turn comes: a file
/// has half a million.
#[derive(Debug, Default)]
pub struct Samples(Vec<Source>);

#[derive(Debug)]
enum Source {
    Held(Vec<Sample>),
    File(Chosen),
}

impl From<Vec<Sample>> for Samples {
    fn from(samples: Vec<Sample>) -> Self {
        Self(vec![Source::Held(samples)])
    }
}

impl Samples {
    pub fn append(&mut self, more: Self) {
        self.0.extend(more.0);
    }

    pub fn len(&self) -> usize {
        let len = |source: &Source| match source {
            Source::Held(samples) => samples.len(),
            Source::File(chosen) => chosen.spots.len(),
        };
        self.0.iter().map(len).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// One after the other. A file that has changed is an error.
    pub fn iter(&self) -> impl Iterator<Item = Result<Sample>> {
        self.0.iter().flat_map(|source| -> Box<dyn Iterator<Item = Result<Sample>>> {
            match source {
                Source::Held(samples) => Box::new(samples.iter().cloned().map(Ok)),
                Source::File(chosen) => Box::new(chosen.iter()),
            }
        })
    }
}

/// The samples that are chosen of a file.
#[derive(Debug)]
struct Chosen {
    path: PathBuf,
    split: String,
    selection: Selection,
    spots: Vec<Spot>,
}

impl Chosen {
    fn iter(&self) -> impl Iterator<Item = Result<Sample>> {
        let mut open = None;
        self.spots.iter().map(move |spot| {
            let sample = self.read(&mut open, *spot).with_context(|| format!("cannot read {}", self.path.display()))?;
            sample.with_context(|| format!("{} has changed since its records were chosen", self.path.display()))
        })
    }

    /// The sample of a record, from the file where it was left; `None` if another is there.
    fn read(&self, open: &mut Option<(BufReader<File>, u64)>, spot: Spot) -> std::io::Result<Option<Sample>> {
        let (file, at) = match open {
            Some(open) => open,
            None => open.insert((BufReader::with_capacity(1 << 16, File::open(&self.path)?), 0)),
        };
        // Mostly it is what comes next, and in the buffer already.
        file.seek_relative(spot.offset.wrapping_sub(*at) as i64)?;
        *at = spot.offset;
        let mut bytes = Vec::with_capacity(spot.bytes as usize);
        *at += file.take(u64::from(spot.bytes)).read_to_end(&mut bytes)? as u64;
        let Some(Entry { id, caption, graph }) = spot.entry(&bytes) else { return Ok(None) };
        Ok(self.selection.graph(graph).map(|graph| Sample {
            index: u64::from(spot.index),
            id,
            dataset: "laion-sg",
            split: self.split.clone(),
            prompt: self.selection.wording.prompt(&caption, &graph),
            drawn_as: self.selection.wording.drawn_as(&graph),
            graph,
        }))
    }
}

/// The samples of the tabletop world's `split`, drawn by `seed`: at most [`MOST`].
pub fn tabletop(split: Split, seed: u64, selection: &Selection) -> Result<Vec<Sample>> {
    let (fewest, most) = split.objects();
    let limit = selection.limit.unwrap_or(LIMIT).min(MOST);
    let sample = |index: u64| {
        let drawn = tasks::text_to_image(seed, split, index, fewest.max(selection.min_objects).min(most), most);
        Sample {
            index,
            id: format!("{}-{index:05}", split.name()),
            dataset: TABLETOP,
            split: split.name().to_owned(),
            prompt: selection.wording.prompt(&drawn.prompt, &drawn.graph),
            drawn_as: selection.wording.drawn_as(&drawn.graph),
            graph: drawn.graph,
        }
    };
    let mut samples = Vec::new();
    for sample in (0..).map(sample) {
        if samples.len() == limit {
            break;
        }
        // Most scenes pass; where not one in a hundred does, the request may be one that none can meet.
        if sample.index >= 100 * (samples.len() + limit.min(100)) as u64 {
            usage!("the split {} has too few scenes with so many objects and these relations", split.name());
        }
        if selection.admits(&sample.graph) {
            samples.push(sample);
        }
    }
    Ok(selection.shard(samples))
}

/// A file of data as a run's config tells it: the same in whatever folder it lies.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DataFile {
    pub file: String,
    pub bytes: u64,
}

/// The file that [`laion_sg`] reads.
pub fn data_file(data: &Path, split: &str) -> Result<DataFile> {
    let path = file_of(data, split)?;
    let bytes = fs::metadata(&path).with_context(|| format!("cannot read {}", path.display()))?.len();
    Ok(DataFile { file: path.file_name().unwrap_or_default().to_string_lossy().into_owned(), bytes })
}

/// The samples of a LAION-SG file, or of the file of `split` in a folder, and the flaws that were found. Held in memory
/// are the places of those of the shard; of a random subset, those of the whole subset.
pub fn laion_sg(data: &Path, split: &str, selection: &Selection) -> Result<(Samples, Flaws)> {
    let path = file_of(data, split)?;
    let file = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut records = Records::new(BufReader::with_capacity(1 << 16, file));
    let mut choice = Choice::new(selection.clone());
    let mut read = 0;
    while !choice.full() {
        let entry = records.next_entry().with_context(|| path.display().to_string())?;
        let Some(Entry { graph, .. }) = entry else { break };
        if selection.graph(graph).is_some() {
            choice.offer(records.spot());
        }
        read += 1;
    }
    match read {
        0 => usage!("{}: no record can be used; {}", path.display(), records.found()),
        _ if choice.n == 0 => {
            usage!("{}: none of {read} records has enough objects and the relations asked for", path.display())
        }
        _ => {}
    }
    let chosen = Chosen { path, split: split.to_owned(), selection: selection.clone(), spots: choice.finish() };
    Ok((Samples(vec![Source::File(chosen)]), records.flaws))
}

/// The file itself, or that of the split in a folder.
fn file_of(data: &Path, split: &str) -> Result<PathBuf> {
    if data.is_file() {
        return Ok(data.to_owned());
    }
    let names = io::files_under(data).with_context(|| format!("cannot read {}", data.display()))?;
    let chosen = choose_file(&names.iter().map(String::as_str).collect::<Vec<_>>(), split)
        .with_context(|| data.display().to_string())?;
    Ok(data.join(chosen))
}

/// Of a data set's files, in whatever folder, the JSON file that is named by the split; without one, that in whose name
/// it is a word.
pub fn choose_file(names: &[&str], split: &str) -> Result<String> {
    let json: Vec<&str> = names.iter().copied().filter(|name| name.ends_with(".json")).collect();
    let named = |fits: fn(&str, &str) -> bool| -> Vec<&str> {
        let is = |name: &str| Path::new(name).file_stem().is_some_and(|stem| fits(&stem.to_string_lossy(), split));
        json.iter().copied().filter(|name| is(name)).collect()
    };
    // In "test-unseen.json", too, "test" is a word.
    let whole = named(|stem, split| stem == split);
    let fitting = if whole.is_empty() { named(has_word) } else { whole };
    match fitting.as_slice() {
        [name] => Ok((*name).to_owned()),
        [] => usage!("there is no .json file of the split \"{split}\", only {json:?}"),
        _ => usage!("more than one .json file is of the split \"{split}\": {fitting:?}; name one of them"),
    }
}

/// Whether a name has a word with neither letters nor digits beside it.
fn has_word(name: &str, word: &str) -> bool {
    name.match_indices(word).any(|(at, _)| {
        let (before, after) = (&name[..at], &name[at + word.len()..]);
        !before.ends_with(char::is_alphanumeric) && !after.starts_with(char::is_alphanumeric)
    })
}

/// The first samples that are offered, or a random subset that does not depend on their order.
struct Choice {
    selection: Selection,
    /// How many are chosen, of all shards.
    n: usize,
    /// The first ones, as far as they are the shard's.
    first: Vec<Spot>,
    /// The subset, by the number each sample draws, the highest on top. Which are the shard's shows at the end.
    drawn: BinaryHeap<(u64, Spot)>,
}

impl Choice {
    fn new(selection: Selection) -> Self {
        Self { selection, n: 0, first: Vec::new(), drawn: BinaryHeap::new() }
    }

    /// The seed and the size of the subset; one without a limit is all there is.
    fn subset(&self) -> Option<(u64, usize)> {
        self.selection.subset.zip(self.selection.limit)
    }

    /// Whether no later sample can be chosen.
    fn full(&self) -> bool {
        self.subset().is_none() && self.selection.limit.is_some_and(|limit| self.n >= limit)
    }

    fn offer(&mut self, spot: Spot) {
        if let Some((seed, limit)) = self.subset() {
            self.drawn.push((Stream::new(seed, "subset", u64::from(spot.index)).next_u64(), spot));
            if self.drawn.len() > limit {
                self.drawn.pop();
            }
            self.n = self.drawn.len();
        } else {
            if self.selection.in_shard(self.n) {
                self.first.push(spot);
            }
            self.n += 1;
        }
    }

    /// Those of the shard, in the order of the data set.
    fn finish(self) -> Vec<Spot> {
        if self.subset().is_none() {
            return self.first;
        }
        let mut subset: Vec<Spot> = self.drawn.into_iter().map(|(_, spot)| spot).collect();
        subset.sort_by_key(|spot| spot.index);
        self.selection.shard(subset)
    }
}

/// A graph's spatial relations, and all its objects.
fn spatial(mut graph: SceneGraph) -> SceneGraph {
    graph.relations.retain(|r| is_spatial(&r.predicate));
    graph
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Selection = Selection {
        wording: Wording::Triples,
        min_relations: 1,
        min_objects: 1,
        predicates: Vec::new(),
        spatial_only: false,
        limit: None,
        subset: None,
        shard: (1, 1),
    };

    fn fixture() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/laion_sg/flawed.json")
    }

    fn samples(selection: &Selection) -> Vec<Sample> {
        laion_sg(&fixture(), "test", selection).unwrap().0.iter().collect::<Result<_>>().unwrap()
    }

    fn ids(selection: Selection) -> Vec<String> {
        samples(&selection).into_iter().map(|s| s.id).collect()
    }

    #[test]
    fn filters_leave_what_they_should() {
        assert_eq!(ids(ALL).len(), 8);
        assert_eq!(ids(Selection { min_relations: 5, ..ALL }), ["9"]);
        // "walking along" is no place, so the ninth has four spatial relations.
        assert!(laion_sg(&fixture(), "test", &Selection { min_relations: 5, spatial_only: true, ..ALL }).is_err());
        assert_eq!(ids(Selection { min_relations: 4, spatial_only: true, ..ALL }), ["9"]);
        assert_eq!(ids(Selection { min_objects: 3, ..ALL }), ["9"]);
        assert_eq!(ids(Selection { predicates: vec!["attached to".into(), "no such".into()], ..ALL })[0], "1");
        assert!(laion_sg(&fixture(), "test", &Selection { predicates: vec!["no such".into()], ..ALL }).is_err());
        assert_eq!(ids(Selection { limit: Some(2), ..ALL }), ["1", "2"]);
    }

    #[test]
    fn shards_part_the_selection_and_a_subset_is_random_but_fixed() {
        assert_eq!(ids(Selection { shard: (1, 3), ..ALL }), ["1", "4", "8"]);
        for (limit, subset) in [None, Some(1), Some(5), Some(100)].into_iter().flat_map(|l| [(l, None), (l, Some(7))]) {
            let whole = || Selection { limit, subset, ..ALL };
            for (part, parts) in (1..=4).flat_map(|parts| (1..=parts).map(move |part| (part, parts))) {
                let expected: Vec<String> = ids(whole()).into_iter().skip(part - 1).step_by(parts).collect();
                assert_eq!(ids(Selection { shard: (part, parts), ..whole() }), expected, "{limit:?} {subset:?}");
            }
        }
        let subset = |seed| ids(Selection { limit: Some(4), subset: Some(seed), ..ALL });
        assert_eq!(subset(1), subset(1));
        assert!((2..20).any(|seed| subset(seed) != subset(1)));
        assert_eq!(subset(1).len(), 4);
    }

    #[test]
    fn what_is_read_at_its_turn_is_what_was_chosen() {
        let mut records = Records::new(BufReader::new(File::open(fixture()).unwrap()));
        let mut expected = Vec::new();
        while let Some(Entry { id, graph, .. }) = records.next_entry().unwrap() {
            expected.push((expected.len() as u64, id, graph.triple_text(), graph));
        }
        let all = samples(&ALL).into_iter();
        assert_eq!(all.map(|s| (s.index, s.id, s.prompt, s.graph)).collect::<Vec<_>>(), expected);
        // Those of several sources follow each other.
        let mut both = Samples::from(tabletop(Split::Test, 0, &Selection { limit: Some(3), ..ALL }).unwrap());
        both.append(laion_sg(&fixture(), "test", &Selection { limit: Some(2), ..ALL }).unwrap().0);
        let ids: Vec<String> = both.iter().map(|sample| sample.unwrap().id).collect();
        assert_eq!((both.len(), ids.len(), &ids[3..]), (5, 5, ["1".to_owned(), "2".to_owned()].as_slice()));
        assert_eq!(both.iter().count(), 5, "they are read again for each mode");

        // A file that is another by now, or gone.
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("test.json");
        let text = fs::read(fixture()).unwrap();
        fs::write(&path, &text).unwrap();
        let (chosen, _) = laion_sg(&path, "test", &ALL).unwrap();
        let error = || format!("{:#}", chosen.iter().find_map(Result::err).unwrap());
        for changed in [&text[1..], &text[..text.len() / 2]] {
            fs::write(&path, changed).unwrap();
            assert!(error().contains("test.json has changed"), "{}", error());
        }
        fs::remove_file(&path).unwrap();
        assert!(error().contains("cannot read"), "{}", error());
    }

    #[test]
    fn a_file_in_which_nothing_can_be_used_is_an_error_that_says_what_was_found() {
        let dir = tempfile::tempdir().unwrap();
        let error = |text: &str| {
            let path = dir.path().join("test.json");
            fs::write(&path, text).unwrap();
            format!("{:#}", laion_sg(&path, "test", &ALL).unwrap_err())
        };
        let wrong = error(r#"[{"img_id": "1", "score": "1", "caption_ori": "c", "items": 1, "relations": []}, 2]"#);
        let told =
            ["no record can be used", "the keys img_id, score", "1 values of a wrong type", "1 records that are no"];
        assert!(told.into_iter().all(|what| wrong.contains(what)), "{wrong}");
        let other = error(r#"[{"items": [1], "text": "x"}]"#);
        let told = ["is not LAION-SG's", "1 records were read", "the keys items, text", "missing keys (record 1"];
        assert!(told.into_iter().all(|what| other.contains(what)), "{other}");
    }

    #[test]
    fn prompts_are_worded_as_asked() {
        let prompt = |wording| samples(&Selection { wording, ..ALL })[0].prompt.clone();
        assert_eq!(prompt(Wording::Triples), "tall stone tower attached to arched stone bridge");
        assert_eq!(prompt(Wording::Caption), "Picture 1");
        assert_eq!(prompt(Wording::Both), "Picture 1; tall stone tower attached to arched stone bridge");
        assert_eq!(prompt(Wording::Plain), "Picture 1");
        let plain = &samples(&Selection { wording: Wording::Plain, ..ALL })[0];
        let target = plain.target(false);
        assert_eq!(target.words(), "a tall stone tower attached to an arched stone bridge");
    }

    #[test]
    fn a_folder_is_searched_for_the_split() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::copy(fixture(), dir.path().join("LAION-SG_test.json")).unwrap();
        assert_eq!(laion_sg(dir.path(), "test", &ALL).unwrap().0.len(), 8);
        // As the data set's repository has it.
        std::fs::create_dir(dir.path().join("dataset_train")).unwrap();
        std::fs::copy(fixture(), dir.path().join("dataset_train/val.json")).unwrap();
        assert_eq!(laion_sg(dir.path(), "val", &ALL).unwrap().0.len(), 8);
        let error = format!("{:#}", laion_sg(dir.path(), "train", &ALL).unwrap_err());
        assert!(error.contains("LAION-SG_test.json"), "{error}");
        let bytes = fs::metadata(fixture()).unwrap().len();
        let told = data_file(dir.path(), "test").unwrap();
        assert_eq!(told, DataFile { file: "LAION-SG_test.json".into(), bytes });
    }

    #[test]
    fn a_split_is_a_word_of_one_files_name() {
        let chosen = |names: &[&str]| choose_file(names, "test").map_err(|error| error.to_string());
        let one = chosen(&["latest.json", "test/train.json", "a_test.txt", "a/LAION-SG_test.json"]);
        assert_eq!(one.unwrap(), "a/LAION-SG_test.json");
        assert_eq!(chosen(&["test-unseen.json", "x/test.json"]).unwrap(), "x/test.json");
        assert!(chosen(&["latest.json", "test2.json"]).unwrap_err().contains("there is no .json file"));
        let several = chosen(&["a_test.json", "train.json", "b-test.json"]).unwrap_err();
        assert!(several.contains(r#"["a_test.json", "b-test.json"]"#), "{several}");
    }

    #[test]
    fn the_world_gives_as_many_as_asked_and_no_graph_without_relations() {
        let selection = Selection { limit: Some(30), ..ALL };
        let samples = tabletop(Split::Test, 0, &selection).unwrap();
        assert_eq!(samples.len(), 30);
        assert!(samples.iter().all(|s| !s.graph.relations.is_empty() && s.prompt == s.graph.triple_text()));
        for limit in [30, usize::MAX] {
            let none = Selection { min_relations: 50, limit: Some(limit), ..ALL };
            assert!(tabletop(Split::Test, 0, &none).is_err());
        }
        let depth = Selection { predicates: vec!["behind".into(), "in front of".into()], ..selection };
        let says = |s: &Sample| s.graph.relations.iter().any(|r| depth.predicates.contains(&r.predicate));
        let samples = tabletop(Split::Test, 0, &depth).unwrap();
        assert!(samples.len() == 30 && samples.iter().all(says));
    }
}
