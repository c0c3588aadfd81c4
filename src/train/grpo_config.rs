//! The config of Reflection-GRPO: which models, whose role is trained, how groups are sampled and rewarded.

use super::{
    Objective,
    actor::{Actor, ActorConfig},
    editor::{Editor, EditorConfig, LossKind},
    flow_steps::Pieces,
    frozen,
    grpo::{Advantages, Scale, TokenLossKind, advantages},
    joint::{Joint, JointConfig},
    optim::OptimConfig,
    request::RunConfig,
    train_config::{Format, TrainConfig},
};
use crate::{
    flow::Klein,
    io::hub::Hub,
    models::{Adapter, Folder, built_in, peft::Peft},
    rig::reward::ByVerdicts,
    usage,
};
use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

/// Who learns; Actor, Editor and both have a section of the config by their names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Learner {
    /// Stage 1: the VLM that writes edits.
    Actor,
    /// Stage 2: the flow transformer that carries them out.
    Editor,
    /// The same transformer as it draws. The section `editor` counts.
    Diffuser,
    /// Both, over whole trajectories; the other two sections count as well.
    Joint,
}

impl Learner {
    /// Those whose weights change.
    fn roles(self) -> &'static [&'static str] {
        match self {
            Self::Actor => &[built_in::ACTOR],
            Self::Editor => &[built_in::EDITOR],
            Self::Diffuser => &[built_in::DIFFUSER],
            Self::Joint => &[built_in::ACTOR, built_in::EDITOR],
        }
    }
}

/// The folder of an adapter, or `built-in`, or several that are added up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "a folder, or a list of folders")]
pub enum Folders {
    One(PathBuf),
    Several(Vec<PathBuf>),
}

impl Folders {
    fn each(&self) -> &[PathBuf] {
        match self {
            Self::One(folder) => std::slice::from_ref(folder),
            Self::Several(folders) => folders,
        }
    }
}

/// A config of `rlrig train grpo`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GrpoConfig {
    pub objective: Learner,
    /// Of the adapters' first weights, and of all that is drawn.
    pub seed: u64,
    pub models: ModelsConfig,
    pub adapter: AdapterConfig,
    pub group: GroupConfig,
    pub train: TrainConfig,
    pub optim: OptimConfig,
    pub actor: ActorConfig,
    pub editor: EditorConfig,
    pub joint: JointConfig,
}

/// Folders or hub ids of the models; the built-in ones where none is given.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelsConfig {
    /// The pipeline: Diffuser and Editor.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<PathBuf>,
    /// The VLM: Checker and Actor.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vlm: Option<PathBuf>,
    /// Another VLM, for the reward `judge`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub judge: Option<PathBuf>,
    /// Adapters: what the learner goes on from, and what the others have on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub actor: Option<Folders>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub editor: Option<Folders>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub diffuser: Option<Folders>,
    /// Width and height of pictures in pixels; the pipeline's own if not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size: Option<u32>,
    /// What the frozen weights compute in; adapters are trained in f32.
    pub dtype: Format,
    /// How many times the Checker looks at a picture (`rlrig generate --looks`).
    pub looks: usize,
}

/// The low-rank adapter that is trained, or, with `rank` 0, that all weights of the model are: the Actor's VLM, the Editor's
/// transformer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdapterConfig {
    pub rank: usize,
    pub alpha: f64,
    /// The layers by the ends of their names; the learner's usual ones if there are none.
    pub targets: Vec<String>,
}

/// How groups are made and what their members are worth.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GroupConfig {
    /// Members of a group. `train.batch` counts groups.
    pub size: usize,
    /// By which standard deviation advantages are divided; that of the batch is that of each micro-batch. Where it is not
    /// given: that of the group, and none with the Actor's loss `dr_grpo` in the Actor's stage.
    pub scale: Option<Scale>,
    /// A standard deviation counts as at least this much reward: smaller differences are noise, which would be blown up to
    /// full size. 0 is TRL's behaviour.
    pub min_std: f64,
    pub combine: Combine,
    /// Rewards by name, each with its weight; one of weight 0 is only logged. [`CHECKER`] alone where there are none.
    pub rewards: BTreeMap<String, f64>,
    /// How often each batch of rollouts is used, and into how many updates it is split each time, of whole micro-batches.
    pub epochs: usize,
    pub minibatches: usize,
    /// Rollouts of the Editor that go through the network together in an update, at most; 0 is all of a micro-batch. Less take
    /// less memory, to the same gradients.
    pub rows: usize,
    /// Training stops when a larger share of a step's rewards is missing.
    pub max_missing: f64,
}

/// The paper's reward, the share of the claims that the Checker sees fulfilled: another name of [`ByVerdicts::Satisfied`].
pub const CHECKER: &str = "checker";
/// The rewards by judges other than the Checker.
const BY_OTHERS: [&str; 2] = ["judge", "oracle"];

/// How several rewards become one advantage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Combine {
    /// The weighted sum is compared within the group.
    #[default]
    SumThenNormalise,
    /// Each reward is, and the advantages are summed with their weights, so that none counts more for varying more.
    NormaliseThenSum,
}

impl Default for GrpoConfig {
    fn default() -> Self {
        Self {
            objective: Learner::Actor,
            seed: 0,
            models: ModelsConfig::default(),
            adapter: AdapterConfig::default(),
            group: GroupConfig::default(),
            train: TrainConfig::default(),
            optim: OptimConfig::default(),
            actor: ActorConfig::default(),
            editor: EditorConfig::default(),
            joint: JointConfig::default(),
        }
    }
}

impl Default for ModelsConfig {
    fn default() -> Self {
        Self {
            model: None,
            vlm: None,
            judge: None,
            actor: None,
            editor: None,
            diffuser: None,
            size: None,
            dtype: Format::F32,
            looks: 1,
        }
    }
}

impl Default for AdapterConfig {
    fn default() -> Self {
        Self { rank: 16, alpha: 32.0, targets: Vec::new() }
    }
}

impl Default for GroupConfig {
    fn default() -> Self {
        Self {
            size: 8,
            scale: None,
            min_std: 0.02,
            combine: Combine::SumThenNormalise,
            rewards: BTreeMap::new(),
            epochs: 1,
            minibatches: 1,
            rows: 0,
            max_missing: 0.25,
        }
    }
}

impl AdapterConfig {
    /// A new adapter; `usual` are the layers where the config names none.
    pub fn fresh(&self, usual: &[&str], seed: u64) -> Result<Adapter> {
        if self.rank == 0 || !self.alpha.is_finite() {
            usage!("an adapter has a rank and an alpha, not {} and {}", self.rank, self.alpha);
        }
        let usual = || usual.iter().map(|t| (*t).to_owned()).collect();
        let targets = if self.targets.is_empty() { usual() } else { self.targets.clone() };
        Ok(Adapter::fresh(self.rank, self.alpha, targets, seed))
    }
}

impl GroupConfig {
    /// Refuses groups that teach nothing, and rewards that the learner, who has `own` ones beside those by verdicts and by
    /// other judges, does not know.
    pub fn check(&self, own: &[&str]) -> Result<()> {
        if self.size < 2 {
            usage!("group.size is at least 2, not {}: a single member has nothing to be compared with", self.size);
        }
        if self.size < 8 {
            tracing::warn!("groups of {} are small: the mean of a group is a rough baseline", self.size);
        }
        if self.epochs == 0 || self.minibatches == 0 {
            usage!("group.epochs and group.minibatches are at least 1");
        }
        if !self.min_std.is_finite() || self.min_std < 0.0 {
            usage!("group.min_std is 0 or more, not {}", self.min_std);
        }
        if !(0.0..=1.0).contains(&self.max_missing) {
            usage!("group.max_missing is a share, from 0 to 1, not {}", self.max_missing);
        }
        let by_verdicts = ByVerdicts::ALL.iter().map(|r| r.name());
        let known: Vec<&str> =
            [CHECKER].into_iter().chain(by_verdicts).chain(BY_OTHERS).chain(own.iter().copied()).collect();
        let weights = self.weights();
        if let Some(name) = weights.keys().find(|name| !known.contains(name)) {
            usage!("group.rewards: there is no reward {name:?}; there are {}", known.join(", "));
        }
        if weights.values().all(|weight| *weight == 0.0) || !weights.values().all(|w| w.is_finite() && *w >= 0.0) {
            usage!(
                "group.rewards gives no reward a weight, or one that is no number from 0 on: more is better of each"
            );
        }
        Ok(())
    }

    /// The weights of the rewards by their names.
    pub fn weights(&self) -> BTreeMap<&str, f64> {
        // Not the default of `rewards` itself, to which a config could only add.
        if self.rewards.is_empty() {
            return BTreeMap::from([(CHECKER, 1.0)]);
        }
        self.rewards.iter().map(|(name, weight)| (name.as_str(), *weight)).collect()
    }

    /// The advantages of rewards.
    pub fn advantages(&self, rewards: &[f64], groups: &[u64]) -> Result<Advantages> {
        advantages(rewards, groups, self.scale.unwrap_or_default(), self.min_std)
    }

    /// The updates that are made of a batch of rollouts.
    pub fn updates(&self) -> usize {
        self.epochs * self.minibatches
    }

    /// The group of each of `count` rollouts that come group by group.
    pub fn numbers(&self, count: usize) -> Vec<u64> {
        (0..count).map(|i| (i / self.size) as u64).collect()
    }

    /// Whether a reward is asked for, be it for the log alone.
    pub fn asks(&self, name: &str) -> bool {
        self.weights().contains_key(name)
    }
}

impl ModelsConfig {
    /// The pipeline's folder.
    pub fn pipeline(&self) -> Result<Folder> {
        folder(self.model.as_deref(), built_in::PIPELINE, "models.model")
    }

    /// The VLM's folder.
    pub fn vlm(&self) -> Result<Folder> {
        let folder = folder(self.vlm.as_deref(), built_in::VLM, "models.vlm")?;
        if self.vlm.is_some() { Ok(folder) } else { folder.require("vlm") }
    }

    /// The judge's folder.
    pub fn judge(&self) -> Result<Option<Folder>> {
        self.judge.as_deref().map(|name| folder(Some(name), &[], "models.judge")).transpose()
    }

    /// Bytes of the weights of all of them.
    pub fn bytes(&self) -> Result<usize> {
        let (pipeline, dtype) = (self.pipeline()?, self.dtype.dtype());
        let mut parts = vec![(self.vlm()?, dtype)];
        // The autoencoder computes in f32 in any case.
        for (name, dtype) in [("transformer", dtype), ("text_encoder", dtype), ("vae", DType::F32)] {
            parts.push((pipeline.require(name)?, dtype));
        }
        parts.extend(self.judge()?.map(|folder| (folder, dtype)));
        parts.iter().map(|(folder, dtype)| frozen::bytes(folder, *dtype)).sum()
    }

    /// Width and height of pictures.
    pub fn size(&self, klein: &Klein) -> (u32, u32) {
        self.size.map_or_else(|| klein.default_size(), |side| (side, side))
    }

    /// The adapter that a role ([`built_in::ACTOR`], [`built_in::EDITOR`], [`built_in::DIFFUSER`]) has before training.
    pub fn adapter(&self, role: &str) -> Result<Option<Peft>> {
        let of_role = match role {
            built_in::ACTOR => &self.actor,
            built_in::EDITOR => &self.editor,
            _ => &self.diffuser,
        };
        let open = |path: &PathBuf| {
            let folder = match path.to_str() {
                Some(built_in::NAME) => built_in::adapter(role),
                _ => path.is_dir().then(|| Folder::from(path.clone())),
            };
            let Some(folder) = folder else { usage!("models.{role}: there is no adapter {}", path.display()) };
            Peft::open(&folder)
        };
        let sum = |folders: &Folders| {
            if folders.each().is_empty() {
                usage!("models.{role} names no adapter");
            }
            Peft::sum(folders.each().iter().map(open).collect::<Result<Vec<_>>>()?).context(format!("models.{role}"))
        };
        of_role.as_ref().map(sum).transpose()
    }

    /// The same as it is, for a role that is not trained.
    pub fn frozen(&self, role: &str) -> Result<Option<Adapter>> {
        Ok(self.adapter(role)?.map(|peft| peft.adapter(1.0)))
    }
}

impl GrpoConfig {
    /// The adapter that is trained for a role: the one that `models` names, or a new one; `usual` are the layers where the
    /// config names none. `None` where all weights are trained.
    pub fn learned(&self, role: &str, usual: &[&str]) -> Result<Option<Adapter>> {
        match self.models.adapter(role)? {
            Some(_) if self.adapter.rank == 0 => {
                usage!("adapter.rank = 0 trains all weights, which go on from those of models, not from models.{role}")
            }
            None if self.adapter.rank == 0 && self.models.dtype != Format::F32 => {
                usage!("adapter.rank = 0 trains all weights, which is done in f32: set models.dtype to f32")
            }
            None if self.adapter.rank == 0 => Ok(None),
            Some(peft) => Ok(Some(peft.learned())),
            None => Ok(Some(self.adapter.fresh(usual, self.seed)?)),
        }
    }

    /// Refuses more updates of a batch than there are micro-batches to make them of.
    fn check_updates(&self) -> Result<()> {
        let (micro, batches) = (self.train.micro_batch(), self.train.micro_batches().len());
        if self.group.minibatches > batches.max(1) {
            usage!(
                "group.minibatches = {} is more than the {batches} micro-batches of a step (train.batch = {} by \
                 train.micro_batch = {micro})",
                self.group.minibatches,
                self.train.batch,
            );
        }
        Ok(())
    }

    /// How the Editor's losses are cut into pieces.
    pub fn pieces(&self) -> Pieces {
        let micro = self.train.micro_batch();
        let rows = if self.group.rows == 0 { usize::MAX } else { self.group.rows };
        Pieces { window: self.editor.window, rows, all: micro * self.group.size }
    }
}

/// Refuses settings of a section that are below 0 or no numbers, of those that are given.
pub fn not_negative(section: &str, settings: &[(&str, Option<f64>)]) -> Result<()> {
    let wrong = |(_, value): &&(&str, Option<f64>)| value.is_some_and(|v| !(v.is_finite() && v >= 0.0));
    if let Some((name, Some(value))) = settings.iter().find(wrong) {
        usage!("[{section}] {name} is 0 or more, not {value}");
    }
    Ok(())
}

fn folder(path: Option<&Path>, parts: &[&'static str], key: &str) -> Result<Folder> {
    if let Some(path) = path {
        if path.is_dir() {
            return Ok(Folder::from(path));
        }
        let Some(name) = path.to_str() else { usage!("{key}: there is no folder {}", path.display()) };
        let local = Hub::from_env()?.locate(name, &|file, done, total| {
            if done == total {
                tracing::info!("{file} is here");
            }
        });
        return Ok(Folder::from(local.with_context(|| key.to_owned())?.path));
    }
    let missing = built_in::missing(parts);
    ensure!(missing.is_empty(), "this rlrig was built without {}; set {key} to a folder", missing.join(", "));
    Ok(built_in::tabletop())
}

impl RunConfig for GrpoConfig {
    fn train(&self) -> &TrainConfig {
        &self.train
    }

    fn optim(&self) -> &OptimConfig {
        &self.optim
    }

    fn build(&self, device: &Device) -> Result<Box<dyn Objective>> {
        self.check_updates()?;
        match self.objective {
            Learner::Actor => Ok(Box::new(Actor::new(self, device)?)),
            Learner::Editor | Learner::Diffuser => Ok(Box::new(Editor::new(self, device)?)),
            Learner::Joint => Ok(Box::new(Joint::new(self, device)?)),
        }
    }

    /// All models, and the adapters of those who do not learn.
    fn built_on(&self) -> Result<BTreeMap<String, String>> {
        let models = &self.models;
        let pipeline = ["transformer", "text_encoder", "tokenizer", "vae"];
        let mut all = BTreeMap::from([
            ("models.model".to_owned(), models.pipeline()?.fingerprint(&pipeline)?),
            ("models.vlm".to_owned(), models.vlm()?.fingerprint(&[])?),
        ]);
        if let Some(judge) = models.judge()? {
            all.insert("models.judge".to_owned(), judge.fingerprint(&[])?);
        }
        let learning = self.objective.roles();
        for role in [built_in::ACTOR, built_in::EDITOR, built_in::DIFFUSER] {
            if let Some(adapter) = models.adapter(role)?.filter(|_| !learning.contains(&role)) {
                all.insert(format!("models.{role}"), adapter.revision);
            }
        }
        Ok(all)
    }

    fn unused(&self) -> Vec<(&'static str, &'static str)> {
        use Learner::{Actor, Diffuser, Editor, Joint};
        let Self { objective, actor, editor, .. } = self;
        let is = |learners: &[Learner]| learners.contains(objective);
        let joint = is(&[Joint]);
        let (flow, nft) = (is(&[Editor, Diffuser, Joint]), editor.loss == LossKind::DiffusionNft);
        let mut unused = Vec::new();
        let mut add = |counts_for_nothing: bool, purpose: &'static str, keys: &[&'static str]| {
            unused.extend(keys.iter().filter(|_| counts_for_nothing).map(|key| (*key, purpose)));
        };
        add(!is(&[Actor, Joint]), "the objectives actor and joint", &["actor"]);
        add(!flow, "the objectives editor, diffuser and joint", &["editor", "group.rows"]);
        add(!joint, "the objective joint", &["joint"]);
        add(joint, "the objective actor; joint has its own", &["actor.steps", "actor.evaluation"]);
        add(joint, "the objective actor; joint guides edits by [editor]", &["actor.edit_guidance"]);
        let posed =
            ["editor.drawn", "editor.min_objects", "editor.max_objects", "editor.draws", "editor.evaluation_steps"];
        add(joint, "the objective editor; joint poses problems by [actor]", &posed);
        add(joint, "the objective editor; joint has its own", &["editor.evaluation"]);
        add(is(&[Diffuser]), "edits", &["editor.edit_guidance"]);
        add(is(&[Diffuser]) || is(&[Editor]) && editor.drawn == 0.0, "edits of drawings", &["editor.draws"]);
        let stochastic = ["editor.policy", "editor.shared_noise", "editor.eps", "editor.kl_form"];
        add(!joint && nft, "the losses over stochastic steps", &stochastic);
        add(!nft, "the loss diffusion-nft", &["editor.beta"]);
        add(actor.loss == TokenLossKind::Cispo, "losses that clip on both sides", &["actor.eps_low"]);
        unused
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Usage;

    #[test]
    fn groups_that_teach_nothing_are_refused() {
        let config = |size, rewards: &[(&str, f64)]| GroupConfig {
            size,
            rewards: rewards.iter().map(|(name, weight)| ((*name).to_owned(), *weight)).collect(),
            ..GroupConfig::default()
        };
        assert!(config(2, &[("gain", 1.0), ("format", 0.1)]).check(&["format"]).is_ok());
        for (config, word) in [
            (config(1, &[("gain", 1.0)]), "at least 2"),
            (config(8, &[("gian", 1.0)]), "no reward \"gian\""),
            (config(8, &[("oracle", 0.0)]), "no reward a weight"),
            (GroupConfig { min_std: -1.0, ..config(8, &[]) }, "min_std"),
        ] {
            let error = config.check(&["oracle"]).unwrap_err();
            assert!(error.is::<Usage>() && error.to_string().contains(word), "{error}");
        }
    }

    #[test]
    fn what_counts_for_nothing_is_refused() {
        for (objective, line, key) in [
            ("actor", "editor.steps = 3", "editor"),
            ("actor", "group.rows = 2", "group.rows"),
            ("actor", "actor = { loss = 'cispo', eps_low = 0.1 }", "actor.eps_low"),
            ("editor", "joint.rounds = 5", "joint"),
            ("editor", "editor.draws = 2", "editor.draws"),
            ("editor", "editor.beta = 0.5", "editor.beta"),
            ("editor", "editor = { loss = 'diffusion-nft', policy = { kind = 'cps', noise = 0.3 } }", "editor.policy"),
            ("diffuser", "editor.edit_guidance = { text = 5.0, image = 2.5 }", "editor.edit_guidance"),
            ("joint", "actor.steps = 3", "actor.steps"),
            ("joint", "editor.drawn = 0.5", "editor.drawn"),
        ] {
            let config: GrpoConfig = toml::from_str(&format!("objective = '{objective}'\n{line}")).unwrap();
            let error = config.check_unused(|_| true).unwrap_err();
            let words = format!("{key} counts for nothing here");
            assert!(error.is::<Usage>() && error.to_string().starts_with(&words), "{line}: {error}");
            assert!(config.check_unused(|other| other != key).is_ok(), "{line}");
            // Without them the rest is left.
            let rest: GrpoConfig = toml::from_str(&config.to_toml().unwrap()).unwrap();
            assert!(rest.check_unused(|_| true).is_ok() && rest.objective == config.objective, "{line}");
        }
        for used in ["editor = { drawn = 0.5, draws = 2 }", "editor = { loss = 'diffusion-nft', beta = 0.5 }"] {
            let config: GrpoConfig = toml::from_str(&format!("objective = 'editor'\n{used}")).unwrap();
            assert!(config.check_unused(|_| true).is_ok(), "{used}");
        }
    }

    #[test]
    fn without_other_rewards_the_checkers_counts() {
        let group = GroupConfig::default();
        assert!(group.check(&[]).is_ok() && group.asks(CHECKER) && !group.asks("oracle"));
        let config = GrpoConfig::default();
        assert_eq!(toml::from_str::<GrpoConfig>(&config.to_toml().unwrap()).unwrap().group, config.group);
    }

    #[test]
    fn more_updates_than_micro_batches_are_refused() {
        let config = |minibatches, micro_batch| {
            let mut config = GrpoConfig::default();
            config.group.minibatches = minibatches;
            (config.train.batch, config.train.micro_batch) = (8, micro_batch);
            config.check_updates()
        };
        assert!(config(3, 3).is_ok() && config(1, 0).is_ok() && config(8, 1).is_ok());
        for (minibatches, micro_batch, words) in [(4, 3, "= 4 is more than the 3"), (2, 0, "= 2 is more than the 1")] {
            let error = config(minibatches, micro_batch).unwrap_err();
            assert!(error.is::<Usage>() && error.to_string().contains(words), "{error}");
        }
    }
}
