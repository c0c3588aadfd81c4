//! Pretraining of the small vision-language model: [`super::vlm_tasks`] as an objective.
//!
//! Each picture is read once, by the vision tower and as the decoder's prefix, and its questions are asked in parallel
//! over that prefix, as they will be when the model is used: the cost of a question is that of its own words. The loss is
//! the cross entropy of the answers' tokens, where the word that decides a verdict weighs more than others.
//!
//! Instead of all weights an adapter can be trained, on edits alone: the Actor's, which the Checker looks without.

use super::{
    Batch, Metrics, Objective, Step, actor,
    ahead::Ahead,
    checkpoint,
    drawn::{self, Drawn},
    imperfect::imperfect,
    vlm_config::{Shape, VlmConfig},
    vlm_tasks::{self, Mix, Row, Task},
};
use crate::{
    models::{
        Adapter, Folder, Params, peft,
        qwen3_vl::{self, Features, Patches, Qwen3VL, rope_positions},
    },
    rig::prompts,
    scene::tabletop::split::Split,
    tensor::{Mask, cross_entropy, rng::Stream, select_rows},
    vlm::{
        Vlm,
        chat::Chat,
        image::ImageProcessor,
        vocabulary::{self, Vocabulary},
    },
};
use anyhow::{Context, Result};
use candle_core::{DType, Device, Tensor, Var};
use image::RgbImage;
use rayon::prelude::*;
use serde_json::{Value, json};
use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
    sync::Arc,
};

/// The files beside the tensors, by name.
type Files = Vec<(String, Vec<u8>)>;

/// Lessons whose texts the vocabulary is learned from.
const TEXTS: u64 = 1500;

/// The objective.
pub struct VlmObjective {
    pub(super) vlm: Arc<Vlm>,
    /// Who checks in an evaluation: the same, without the adapter that is trained.
    pub(super) checker: Arc<Vlm>,
    params: Params,
    adapter: Option<Adapter>,
    files: Files,
    /// To learn from, and held out.
    pub(super) drawn: (Vec<Drawn>, Vec<Drawn>),
    pub(super) config: VlmConfig,
    pub(super) seed: u64,
    ahead: Ahead<Lessons>,
}

/// Pictures with their questions, as numbers on the host.
struct Lessons {
    patches: Patches,
    grid: [usize; 2],
    /// How a question about a picture begins.
    prefix: Vec<u32>,
    groups: Vec<Group>,
}

/// How much more the word that decides a verdict weighs than another token.
const DECISIVE: f32 = 4.0;
/// About how many tokens are answered of a picture: it keeps the loss of the order of 1.
const TOKENS: f32 = 64.0;
/// Rows whose lengths differ by less than this are padded to one length. Padding costs the CPU time, while other devices
/// would wait for the many operations of small groups.
const BUCKET: usize = 10;
const BUCKET_ELSEWHERE: usize = 64;

/// The questions of one batch that are asked together: one row each.
#[derive(Default)]
struct Group {
    /// Whether they are about pictures.
    seen: bool,
    /// The picture of each row.
    pictures: Vec<usize>,
    /// What follows the prefix: the rest of the question and the answer.
    ids: Vec<Vec<u32>>,
    /// Where the answer begins in each row.
    begins: Vec<usize>,
    /// Where the word is that decides, in a verdict.
    decides: Vec<Option<usize>>,
    tasks: Vec<Task>,
}

/// Token losses of one task.
#[derive(Clone, Copy, Default)]
struct Tally {
    loss: f64,
    tokens: f64,
    /// Tokens that the model holds for the likeliest.
    right: f64,
}

impl VlmObjective {
    pub fn new(config: &VlmConfig, seed: u64, device: &Device) -> Result<Self> {
        config.check()?;
        let adapter = config.adapter.as_ref().map(|a| a.fresh(actor::TARGETS, seed)).transpose()?;
        let (params, chat, model_config, files) = match &config.init {
            Some(path) => {
                let folder = Folder::from(path.clone());
                let names = ["config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json"];
                let files = names.iter().chain(&["tokenizer_config.json", "chat_template.jinja"]);
                let read = |name: &&str| Ok(((*name).to_owned(), folder.read(name)?.into_owned()));
                let files: Files = files.map(read).collect::<Result<_>>()?;
                let params = Params::open(&folder, "model", DType::F32, device)?;
                let params = match &adapter {
                    Some(adapter) => params.adapted(vec![adapter.clone()]),
                    None => params.trained(),
                };
                (params, Chat::open(&folder)?, folder.json("config.json")?, files)
            }
            None => {
                config.shape.check()?;
                let vocabulary = learn_vocabulary(config.shape.vocabulary)?;
                let dir = tempfile::tempdir()?;
                vocabulary.write(dir.path())?;
                let chat = Chat::open(&Folder::from(dir.path()))?;
                let model_config = config.shape.config(&chat)?;
                let files = files(&config.shape, &model_config, &chat, vocabulary)?;
                (Params::fresh(seed, DType::F32, device), chat, model_config, files)
            }
        };
        let params = params.multiplied_in(config.precision);
        let model = Qwen3VL::new(&model_config, &params)?;
        params.finish(|_| false)?;
        adapter.as_ref().map(Adapter::check).transpose()?;
        let processor = files.iter().find(|(name, _)| name == "preprocessor_config.json");
        let images = ImageProcessor::parse(&processor.context("no image processor")?.1)?;
        let vlm = Arc::new(Vlm::new(model, chat, images)?);
        let checker = match &config.init {
            Some(path) if adapter.is_some() => {
                let bare = Qwen3VL::new(&model_config, &params.again(Vec::new()))?;
                Arc::new(Vlm::of(bare, &Folder::from(path.clone()))?)
            }
            _ => vlm.clone(),
        };
        let drawn = drawn::open(&config.drawn)?;
        let (config, ahead) = (config.clone(), Ahead::default());
        Ok(Self { vlm, checker, params, adapter, files, drawn, config, seed, ahead })
    }

    /// The model under training, for its evaluation elsewhere.
    pub fn vlm(&self) -> &Vlm {
        &self.vlm
    }

    fn tokenizer(&self) -> Result<&str> {
        let file = self.files.iter().find(|(name, _)| name == "tokenizer.json").context("no tokenizer")?;
        std::str::from_utf8(&file.1).context("tokenizer.json is not UTF-8")
    }

    fn mix(&self, step: u64) -> Mix<'_> {
        let stage = self.config.curriculum.iter().rev().find(|(from, _)| *from <= step);
        Mix { config: &self.config, objects: stage.map_or(3, |(_, objects)| *objects) }
    }

    /// The lessons of a batch.
    fn lessons(&self, batch: &Batch) -> Result<Lessons> {
        let (mix, seed) = (self.mix(batch.step), self.seed);
        // An Actor's edits; what nothing is to be mended in teaches it nothing.
        let taught = |mut rows: Vec<Row>| {
            rows.retain(|row| self.adapter.is_none() || row.task == Task::Act);
            rows
        };
        let show = |index: u64| {
            let mut rng = Stream::new(seed, "vlm picture", index);
            let drawn = if !self.drawn.0.is_empty() && rng.chance(self.config.drawn_share) {
                Some(rng.choose(&self.drawn.0).varied(&mut rng))
            } else if rng.share(self.config.imperfect) {
                Some(imperfect(seed, index, mix.objects))
            } else {
                None
            };
            let drawn = drawn.map(|drawn| (taught(vlm_tasks::drawn_rows(seed, index, &drawn, mix)), drawn.picture));
            drawn.filter(|(rows, _)| !rows.is_empty()).unwrap_or_else(|| {
                let lesson = vlm_tasks::lesson(seed, Split::Train, index, mix);
                let picture = vlm_tasks::picture(&mut rng, &lesson.scene);
                (taught(lesson.rows), picture)
            })
        };
        let (lessons, pictures): (Vec<Vec<Row>>, Vec<RgbImage>) = batch.indices().into_par_iter().map(show).unzip();
        let patches = self.vlm.images.patches(&pictures, &Device::Cpu)?;
        let grid = patches.grids.first().copied().context("an empty batch")?;
        let prefix = self.vlm.prefix(grid)?;
        let groups = self.groups(&lessons, grid, &prefix)?;
        Ok(Lessons { patches, grid, prefix, groups })
    }

    /// Sorts the rows of a batch by whether they have a picture and about how long they are, so that padding stays
    /// little.
    fn groups(&self, lessons: &[Vec<Row>], grid: [usize; 2], prefix: &[u32]) -> Result<Vec<Group>> {
        let rows: Vec<(usize, &Row)> =
            lessons.iter().enumerate().flat_map(|(picture, rows)| rows.iter().map(move |row| (picture, row))).collect();
        let read = |(_, row): &(usize, &Row)| -> Result<(Vec<u32>, usize, Option<usize>)> {
            let seen = row.task != Task::Parse;
            let question = self.vlm.question(&row.question, seen.then_some(grid))?;
            let read = if seen { prefix } else { &[] };
            let rest = question.strip_prefix(read).context("a question begins with its picture")?;
            let decides = match row.task {
                Task::Check => Some(rest.len() + self.vlm.chat.encode(prompts::undecided(&row.answer))?.len()),
                _ => None,
            };
            Ok(([rest, &self.vlm.reply(&row.answer)?].concat(), rest.len(), decides))
        };
        let ids = rows.par_iter().map(read).collect::<Result<Vec<_>>>()?;
        let bucket = if self.vlm.model.decoder.device().is_cpu() { BUCKET } else { BUCKET_ELSEWHERE };
        let mut groups: BTreeMap<(bool, usize), Group> = BTreeMap::new();
        for ((picture, row), (ids, begins, decides)) in rows.into_iter().zip(ids) {
            let seen = row.task != Task::Parse;
            let group = groups.entry((seen, ids.len() / bucket)).or_default();
            group.seen = seen;
            group.pictures.push(picture);
            group.begins.push(begins);
            group.decides.push(decides);
            group.ids.push(ids);
            group.tasks.push(row.task);
        }
        Ok(groups.into_values().collect())
    }
}

impl Group {
    /// The weighted sum of the answers' token losses, and what to log of each task; `states (rows, T, hidden)` are the
    /// decoder's.
    fn loss(&self, vlm: &Vlm, states: &Tensor) -> Result<(Tensor, BTreeMap<&'static str, Tally>)> {
        let width = states.dim(1)?;
        let (mut places, mut targets, mut weights, mut kinds) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (row, (ids, begin)) in self.ids.iter().zip(&self.begins).enumerate() {
            for (i, id) in ids.iter().enumerate().skip(*begin) {
                let decisive = self.decides[row] == Some(i);
                places.push((row * width + i - 1) as u32);
                targets.push(*id);
                weights.push(if decisive { DECISIVE } else { 1.0 } / TOKENS);
                kinds.push((self.tasks[row], decisive));
            }
        }
        let device = states.device();
        let logits = vlm.model.head.forward(&select_rows(&states.flatten(0, 1)?, &places)?)?;
        let losses = cross_entropy(&logits, &Tensor::new(targets.as_slice(), device)?)?;

        let mut tallies: BTreeMap<&'static str, Tally> = BTreeMap::new();
        let values: Vec<f32> = losses.detach().to_vec1()?;
        let best: Vec<u32> = logits.detach().argmax(1)?.to_vec1()?;
        for (i, (task, decisive)) in kinds.iter().enumerate() {
            let name = match (task, decisive) {
                (Task::Check, true) => "verdict",
                (Task::Check, false) => "reflection",
                (Task::Act, _) => "act",
                (Task::Parse, _) => "parse",
                (Task::Describe, _) => "describe",
            };
            let tally = tallies.entry(name).or_default();
            tally.loss += f64::from(values[i]);
            tally.tokens += 1.0;
            tally.right += f64::from(u8::from(best[i] == targets[i]));
        }
        let weights = Tensor::new(weights, device)?;
        Ok(((losses * weights)?.sum_all()?, tallies))
    }
}

impl Objective for VlmObjective {
    fn vars(&self) -> BTreeMap<String, Var> {
        self.adapter.as_ref().map_or_else(|| self.params.vars(), Adapter::vars)
    }

    fn prepare(&self, batch: &Batch) -> Result<()> {
        self.ahead.put(batch, self.lessons(batch)?);
        Ok(())
    }

    fn loss(&self, batch: &Batch) -> Result<Step> {
        let Lessons { patches, grid, prefix, groups } =
            self.ahead.take(batch).map_or_else(|| self.lessons(batch), Ok)?;
        let Vlm { model, .. } = &*self.vlm;
        let pictures = patches.grids.len();
        let values = patches.values.to_device(model.decoder.device())?;
        let features = model.vision.forward(&Patches { values, ..patches })?;

        let config = model.config();
        let merge = config.vision_config.spatial_merge_size;
        let (positions, next) = rope_positions(&prefix, config.image_token_id, merge, 0, &mut [grid].into_iter())?;
        let mut cache = model.decoder.cache();
        let rows = vec![prefix.clone(); pictures];
        let angles = model.decoder.angles(&vec![positions; rows.len()])?;
        model.forward(&rows, Some(&features), &angles, &Mask::causal(), Some(&mut cache))?;

        let mut loss: Option<Tensor> = None;
        let mut tallies: BTreeMap<&'static str, Tally> = BTreeMap::new();
        for group in &groups {
            let longest = group.ids.iter().map(Vec::len).max().unwrap_or(0);
            let past = if group.seen { prefix.len() } else { 0 };
            let pad =
                |ids: &Vec<u32>| [ids.as_slice(), &vec![config.vision_end_token_id; longest - ids.len()]].concat();
            let padded: Vec<Vec<u32>> = group.ids.iter().map(pad).collect();
            let keys = group.ids.iter().map(|ids| 0..past + ids.len()).collect();
            let angles = model.decoder.text_angles(if group.seen { next as usize } else { 0 }, longest)?;
            let index: Vec<u32> = group.pictures.iter().map(|i| *i as u32).collect();
            let mut cache = if group.seen { cache.rows(&index)? } else { model.decoder.cache() };
            let mask = Mask { causal: true, keys: Some(keys) };
            let states = model.forward(&padded, None::<&Features>, &angles, &mask, Some(&mut cache))?;
            let (part, more) = group.loss(&self.vlm, &states)?;
            loss = Some(match loss {
                Some(loss) => (loss + part)?,
                None => part,
            });
            for (name, tally) in more {
                let sum = tallies.entry(name).or_default();
                sum.loss += tally.loss;
                sum.tokens += tally.tokens;
                sum.right += tally.right;
            }
        }
        let loss = (loss.context("a batch without questions")? / pictures as f64)?;
        let metrics = tallies
            .into_iter()
            .flat_map(|(name, t)| {
                [(format!("loss/{name}"), t.loss / t.tokens), (format!("right/{name}"), t.right / t.tokens)]
            })
            .collect();
        Ok(Step { loss, metrics })
    }

    fn evaluate(&mut self, _step: u64) -> Result<Metrics> {
        let mut metrics = self.measure(Split::Val, self.config.evaluation, self.objects())?;
        metrics.extend(self.measure_drawn()?);
        Ok(metrics)
    }

    fn samples(&mut self, _: u64, folder: &Path) -> Result<()> {
        self.write_samples(folder)
    }

    fn save(&self, folder: &Path, dtype: DType) -> Result<()> {
        if let Some(adapter) = &self.adapter {
            return peft::write(adapter, folder, dtype);
        }
        for (name, bytes) in &self.files {
            let path = folder.join(name);
            std::fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
        }
        let tensors = self.params.vars().into_iter().map(|(name, var)| (name, var.as_tensor().clone())).collect();
        checkpoint::write_model(&folder.join("model.safetensors"), &tensors, dtype)
    }

    fn state(&self) -> Result<HashMap<String, Tensor>> {
        vocabulary::state(self.tokenizer()?)
    }

    fn restore(&mut self, state: HashMap<String, Tensor>) -> Result<()> {
        vocabulary::expect_state(&state, self.tokenizer()?)
    }
}

/// Learns the tokens from what will be asked and answered.
fn learn_vocabulary(size: usize) -> Result<Vocabulary> {
    let config = VlmConfig { claims: 12, probes: 1, act: 0.5, parse: 0.5, ..VlmConfig::default() };
    let mix = Mix { config: &config, objects: 3 };
    let lessons = (0..TEXTS).into_par_iter().map(|i| vlm_tasks::lesson(0, Split::Train, i, mix));
    let texts: Vec<String> =
        lessons.flat_map_iter(|lesson| lesson.rows.into_iter().flat_map(|r| [r.question, r.answer])).collect();
    let phrases = vlm_tasks::phrases();
    vocabulary::train_with_phrases(texts, size, &phrases.iter().map(String::as_str).collect::<Vec<_>>())
}

/// All files of the model's folder but its tensors.
fn files(shape: &Shape, config: &qwen3_vl::Config, chat: &Chat, vocabulary: Vocabulary) -> Result<Files> {
    let mut model = serde_json::to_value(config)?;
    model["architectures"] = json!(["Qwen3VLForConditionalGeneration"]);
    model["model_type"] = "qwen3_vl".into();
    model["text_config"]["model_type"] = "qwen3_vl_text".into();
    model["text_config"]["pad_token_id"] = chat.pad().into();
    model["vision_config"]["model_type"] = "qwen3_vl".into();
    let generation =
        json!({ "do_sample": false, "eos_token_id": chat.special("eos_token"), "pad_token_id": chat.pad() });
    let text = |value: &Value| serde_json::to_string_pretty(value).map(String::into_bytes);
    Ok(vec![
        ("config.json".to_owned(), text(&model)?),
        ("generation_config.json".to_owned(), text(&generation)?),
        ("preprocessor_config.json".to_owned(), text(&shape.processor())?),
        ("tokenizer.json".to_owned(), vocabulary.tokenizer.into_bytes()),
        ("tokenizer_config.json".to_owned(), vocabulary.config.into_bytes()),
        ("chat_template.jinja".to_owned(), vocabulary::TEMPLATE.as_bytes().to_vec()),
    ])
}
