//! The command line: clap types and nothing else.

mod eval;

pub use eval::*;

use crate::{
    flow::{Inversion, Solver},
    usage,
};
use anyhow::Result;
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;

const EXAMPLES: &str = "\
Examples:
  rlrig generate --prompt \"a small red ball to the left of a large blue cube\"
  rlrig generate --prompt-file prompts.txt --out pictures/ --json
  rlrig info out-0000-7.png
  rlrig doctor";

/// Pictures whose spatial relations are right: generate, reflect, edit; and the training that makes it better.
#[derive(Parser, Debug)]
#[command(name = "rlrig", version, after_help = EXAMPLES, arg_required_else_help = true)]
pub struct Cli {
    /// Say more on stderr; twice for still more (or set RLRIG_LOG, for example RLRIG_LOG=rlrig=debug)
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand, Debug)]
pub enum Command {
    /// Draw pictures of a prompt, check every object and relation, and edit until all hold
    Generate(Box<Generate>),
    /// Edit one picture by an instruction
    Edit(Edit),
    /// Check whether a picture shows what a prompt asks for
    Check(Check),
    /// Measure the loop and its rivals on LAION-SG or on held-out scenes of the tabletop world
    Eval(Box<Eval>),
    /// Train a model
    #[command(subcommand)]
    Train(Train),
    /// The tabletop world: its scenes as a data set, and its pixel oracle
    #[command(subcommand)]
    World(World),
    /// List the built-in models and the hub models in the local cache
    Models(Models),
    /// Show the recipe and the trajectory that a PNG carries; loads no model
    Info(Info),
    /// Tell what this machine has and what would run on it
    Doctor(Doctor),
    /// Print a shell's completion script
    Completions(Completions),
}

const GENERATE_EXAMPLES: &str = "\
Examples:
  rlrig generate --prompt \"a small red ball to the left of a large blue cube, and a green ring above the cube\"
  rlrig generate --prompt \"large red ball left of small blue cube\" --seed 7 --trajectory turns/
  rlrig generate --prompt \"a yellow star above a blue cube\" -n 4 --out pictures/
  rlrig generate --prompt \"...\" --seed 1 2 3 --rounds 1          draw only, three seeds
  cat prompts.txt | rlrig generate --prompt - --out pictures/ --json
  rlrig generate --from out-0000-7.png --seed 8                  the same recipe with another seed";

#[derive(Args, Debug)]
#[command(after_help = GENERATE_EXAMPLES)]
pub struct Generate {
    #[command(flatten)]
    pub asked: Asked,
    #[command(flatten)]
    pub only: OnlyArgs,
    /// Replay the recipe of a PNG made by rlrig; flags given beside it win
    #[arg(long, value_name = "FILE.png", help_heading = "What to draw")]
    pub from: Option<PathBuf>,
    /// Seeds, one picture of each prompt for each; drawn, shown and stored when not given
    #[arg(long, value_name = "N", num_args = 1.., help_heading = "What to draw")]
    pub seed: Vec<u64>,
    /// How many pictures of each prompt; the seeds count up from the last one given [default: one for each seed]
    #[arg(short = 'n', long, value_name = "K", help_heading = "What to draw")]
    pub count: Option<usize>,

    #[command(flatten)]
    pub cycle: CycleArgs,
    /// How pictures are edited [default: reference]
    #[arg(long, value_enum, value_name = "E", help_heading = "The loop")]
    pub editor: Option<EditorKind>,
    /// How a picture is inverted to noise, with --editor inversion [default: rf-inversion]
    #[arg(long, value_enum, value_name = "I", help_heading = "The loop")]
    pub inversion: Option<Inversion>,
    /// Prompts that are worked on at once; the pictures depend on it by rounding at most
    #[arg(long, value_name = "N", default_value_t = 8, help_heading = "The loop")]
    pub batch: usize,

    #[command(flatten)]
    pub sampling: Sampling,
    #[command(flatten)]
    pub painter: PainterArgs,
    #[command(flatten)]
    pub critic: CriticArgs,
    #[command(flatten)]
    pub models: ModelArgs,

    /// Where the picture goes: a .png file, or a folder [default: out-NNNN-SEED.png here]
    #[arg(short, long, value_name = "FILE|DIR", help_heading = "Output")]
    pub out: Option<PathBuf>,
    /// Overwrite files that exist
    #[arg(long, help_heading = "Output")]
    pub force: bool,
    /// Keep every turn in this folder: pictures, trajectory.json, a contact sheet and one HTML page
    #[arg(long, value_name = "DIR", help_heading = "Output")]
    pub trajectory: Option<PathBuf>,
    /// Start from this noise (tensor `noise`) instead of the seed's
    #[arg(long, value_name = "FILE.safetensors", help_heading = "Output")]
    pub init_noise: Option<PathBuf>,
    /// Save the noise of the first round
    #[arg(long, value_name = "FILE.safetensors", help_heading = "Output")]
    pub save_noise: Option<PathBuf>,
    /// Leave the recipe out of the PNG
    #[arg(long, help_heading = "Output")]
    pub no_metadata: bool,
    #[command(flatten)]
    pub print: Print,
}

/// What is asked for: text, a file of texts, or a scene graph.
#[derive(Args, Debug, Default)]
pub struct Asked {
    /// The prompt; `-` reads prompts from stdin, one a line
    #[arg(short, long, value_name = "TEXT|-", help_heading = "What to draw")]
    pub prompt: Option<String>,
    /// A file of prompts, one a line
    #[arg(long, value_name = "FILE", help_heading = "What to draw", conflicts_with = "prompt")]
    pub prompt_file: Option<PathBuf>,
    /// A scene graph in LAION-SG's JSON (one record or a list) instead of a prompt
    #[arg(long, value_name = "FILE.json", help_heading = "What to draw", conflicts_with_all = ["prompt", "prompt_file"])]
    pub graph: Option<PathBuf>,
}

impl Asked {
    /// Whether anything is asked for.
    pub fn any(&self) -> bool {
        self.prompt.is_some() || self.prompt_file.is_some() || self.graph.is_some()
    }
}

/// Whether there may be more than a prompt says.
#[derive(Args, Debug, Default)]
pub struct OnlyArgs {
    /// Whether pictures may show nothing else than what their prompts name [default: with the built-in models; for eval
    /// with any models, but only on the tabletop world, whose prompts tell all]
    #[arg(long, value_name = "true|false", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub only: Option<bool>,
}

/// How the loop runs.
#[derive(Args, Debug, Default)]
pub struct CycleArgs {
    /// Rounds at most: round 1 draws, a later one edits the best picture so far, or draws anew [default: 4]
    #[arg(long, value_name = "R", help_heading = "The loop")]
    pub rounds: Option<usize>,
    /// How many of the rounds draw before one edits the best picture so far; 1 is the paper's [default: 2]
    #[arg(long, value_name = "D", help_heading = "The loop")]
    pub draws: Option<usize>,
    /// Draw anew after an edit that did not help, instead of editing again; `=false` edits in every later round, as the paper
    /// does [default: true]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true",
          help_heading = "The loop")]
    pub redraw: Option<bool>,
    /// Accept a picture when the Checker gives every claim at least this probability [default: 0.5]
    #[arg(long, value_name = "P", help_heading = "The loop")]
    pub accept: Option<f64>,
    /// How many times the Checker looks at a picture, 1 to 5, each time moved by some pixels; a verdict is the mean
    /// [default: 3 with the built-in one, else 1]
    #[arg(long, value_name = "K", help_heading = "The loop")]
    pub looks: Option<usize>,
}

/// How the flow model samples.
#[derive(Args, Debug, Default)]
pub struct Sampling {
    /// Sampling steps [default: the model's]
    #[arg(long, value_name = "N", help_heading = "Sampling")]
    pub steps: Option<usize>,
    /// How steps are taken when drawing and when editing by reference [default: euler]
    #[arg(long, value_enum, value_name = "NAME", help_heading = "Sampling")]
    pub solver: Option<Solver>,
    /// Guidance strength; 1 switches guidance off; distilled models take none [default: the model's]
    #[arg(long, value_name = "G", help_heading = "Sampling")]
    pub guidance: Option<f64>,
    /// Guidance strength of edits by reference [default: the model's, or --guidance if that is given]
    #[arg(long, value_name = "G", help_heading = "Sampling")]
    pub edit_guidance: Option<f64>,
    /// How strongly edits by reference are guided by the picture, beside the words: more keeps more of it, and takes half as
    /// many evaluations again; 1 is not at all [default: the model's]
    #[arg(long, value_name = "G", help_heading = "Sampling")]
    pub image_guidance: Option<f64>,
}

/// Which model draws and edits.
#[derive(Args, Debug, Default)]
pub struct PainterArgs {
    /// The Diffuser and Editor: a hub id or a folder in diffusers' layout [default: built in]
    #[arg(long, value_name = "HUB_ID|DIR", help_heading = "Models")]
    pub model: Option<String>,
}

/// Which model checks and writes edits.
#[derive(Args, Debug, Default)]
pub struct CriticArgs {
    /// The Checker and Actor: a hub id or a folder in transformers' layout [default: built in]
    #[arg(long, value_name = "HUB_ID|DIR", help_heading = "Models")]
    pub vlm: Option<String>,
}

/// With which adapters, where and in which number format models are opened.
#[derive(Args, Debug, Default)]
pub struct ModelArgs {
    /// A PEFT adapter folder for the Editor or the Actor, with its strength; for the Diffuser with `diffuser=` in front, for
    /// Diffuser or Checker too with `all=`; `none` switches the built-in ones off. May be given several times
    /// [default: built in]
    #[arg(long, value_name = "[all=|diffuser=]DIR[:SCALE]|none", help_heading = "Models")]
    pub adapter: Vec<String>,
    /// Where to compute
    #[arg(long, value_enum, value_name = "D", default_value_t, help_heading = "Models")]
    pub device: DeviceKind,
    /// Number format of the weights [default: f32 on the CPU, bf16 elsewhere]
    #[arg(long, value_enum, value_name = "T", help_heading = "Models")]
    pub dtype: Option<Dtype>,
}

/// What is printed.
#[derive(Args, Debug, Default)]
pub struct Print {
    /// One JSON document a line on stdout
    #[arg(long, help_heading = "Output")]
    pub json: bool,
    /// No progress on stderr
    #[arg(short, long, help_heading = "Output")]
    pub quiet: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum EditorKind {
    /// The source picture joins the sequence as reference tokens
    #[default]
    Reference,
    /// Invert the picture to noise, then sample under the edited prompt
    Inversion,
    /// FlowEdit: no inversion, the difference of two velocities
    Flowedit,
}

impl EditorKind {
    /// How this editor inverts pictures, if it is the one that does.
    pub fn inversion(self, given: Option<Inversion>) -> Result<Inversion> {
        if given.is_some() && self != Self::Inversion {
            usage!("--inversion goes with --editor inversion");
        }
        Ok(given.unwrap_or_default())
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum DeviceKind {
    #[default]
    Auto,
    Cpu,
    Cuda,
    Metal,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Dtype {
    F32,
    F16,
    Bf16,
}

const EDIT_EXAMPLES: &str = "\
Example:
  rlrig edit --image out-0000-7.png --instruction \"move the red ball to the left of the blue cube\" --out edited.png";

#[derive(Args, Debug)]
#[command(after_help = EDIT_EXAMPLES)]
pub struct Edit {
    /// The picture to edit (PNG, JPEG or WebP)
    #[arg(short, long, value_name = "FILE")]
    pub image: PathBuf,
    /// What to change; with --editor inversion or flowedit a prompt of the whole picture that is wanted
    #[arg(long, value_name = "TEXT")]
    pub instruction: String,
    /// Where the edited picture goes
    #[arg(short, long, value_name = "FILE.png")]
    pub out: PathBuf,
    /// Overwrite the file if it exists
    #[arg(long)]
    pub force: bool,
    /// Leave the recipe out of the PNG
    #[arg(long)]
    pub no_metadata: bool,
    /// Drawn, shown and stored when not given
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// How the picture is edited
    #[arg(long, value_enum, value_name = "E", default_value_t)]
    pub editor: EditorKind,
    /// How the picture is inverted to noise, with --editor inversion [default: rf-inversion]
    #[arg(long, value_enum, value_name = "I")]
    pub inversion: Option<Inversion>,
    #[command(flatten)]
    pub sampling: Sampling,
    #[command(flatten)]
    pub painter: PainterArgs,
    #[command(flatten)]
    pub models: ModelArgs,
    #[command(flatten)]
    pub print: Print,
}

const CHECK_EXAMPLES: &str = "\
Example:
  rlrig check --image out-0000-7.png --prompt \"a red ball to the left of a blue cube\" --json

Exits with 0 whether or not the picture passes; the verdicts are the result.";

#[derive(Args, Debug)]
#[command(after_help = CHECK_EXAMPLES)]
pub struct Check {
    /// The picture to check (PNG, JPEG or WebP)
    #[arg(short, long, value_name = "FILE")]
    pub image: PathBuf,
    /// What it should show
    #[arg(short, long, value_name = "TEXT")]
    pub prompt: String,
    /// A claim holds from this probability on
    #[arg(long, value_name = "P", default_value_t = 0.5)]
    pub accept: f64,
    /// How many times the Checker looks at the picture, 1 to 5, each time moved by some pixels; a verdict is the mean
    /// [default: 3 with the built-in one, else 1]
    #[arg(long, value_name = "K")]
    pub looks: Option<usize>,
    #[command(flatten)]
    pub only: OnlyArgs,
    #[command(flatten)]
    pub critic: CriticArgs,
    #[command(flatten)]
    pub models: ModelArgs,
    #[command(flatten)]
    pub print: Print,
}

#[derive(Subcommand, Debug)]
pub enum Train {
    /// Train one of the shipped models from nothing: autoencoder, Diffuser or VLM
    #[command(after_help = PRETRAIN_EXAMPLES)]
    Pretrain(Run),
    /// Reflection-GRPO: train the Actor (stage 1), the Editor (stage 2) or both by what the Checker says of their edits, or the
    /// Diffuser by what it says of its drawings
    #[command(after_help = GRPO_EXAMPLES)]
    Grpo(Run),
}

const PRETRAIN_EXAMPLES: &str = "\
Examples:
  rlrig train pretrain --config configs/tabletop/vae.toml
  rlrig train pretrain --config configs/tabletop/diffuser.toml --set optim.lr=2e-3 --dry-run
  rlrig train pretrain --resume runs/diffuser

Keys of the configuration can be set in the environment too: RLRIG_CONFIG__OPTIM__LR=2e-3 is --set optim.lr=2e-3.";

const GRPO_EXAMPLES: &str = "\
Examples:
  rlrig train grpo --config configs/tabletop/grpo-actor.toml
  rlrig train grpo --config configs/tabletop/grpo-editor.toml --set editor.loss=grpo-guard --dry-run
  rlrig train grpo --config configs/tabletop/grpo-joint.toml --set models.actor=runs/grpo-actor/best
  rlrig train grpo --resume runs/grpo-actor
  rlrig generate --adapter runs/grpo-actor/model --prompt \"...\"       use what was trained
  rlrig generate --adapter diffuser=runs/grpo-diffuser/model --prompt \"...\"

Keys of the configuration can be set in the environment too: RLRIG_CONFIG__GROUP__SIZE=16 is --set group.size=16.";

#[derive(Args, Debug)]
pub struct Run {
    /// The run's configuration
    #[arg(long, value_name = "FILE.toml", required_unless_present = "resume")]
    pub config: Option<PathBuf>,
    /// The run's folder [default: runs/NAME]
    #[arg(short, long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Override one key of the configuration; may be given several times
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Where to compute
    #[arg(long, value_enum, value_name = "D", default_value_t)]
    pub device: DeviceKind,
    /// Go on with a run's folder, exactly where its last checkpoint ends
    #[arg(long, value_name = "DIR", conflicts_with_all = ["config", "out"])]
    pub resume: Option<PathBuf>,
    /// Check configuration, data and model and print the plan without training
    #[arg(long)]
    pub dry_run: bool,
}

#[derive(Subcommand, Debug)]
pub enum World {
    /// Write scenes of a split as pictures and LAION-SG records
    Export(WorldExport),
    /// Let the Diffuser draw over renders of scenes: imperfect pictures to train the Editor and the VLM on
    Redraw(WorldRedraw),
    /// Read the objects and relations of a picture by its pixels alone
    Oracle(WorldOracle),
}

#[derive(Args, Debug)]
#[command(after_help = "Example:\n  rlrig world export --split test --count 500 --seed 0 --out tabletop-test/")]
pub struct WorldExport {
    /// Which split
    #[arg(long, value_name = "NAME", default_value = "train")]
    pub split: String,
    /// How many scenes
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub count: usize,
    /// The same seed gives the same scenes
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub seed: u64,
    /// A new or empty folder
    #[arg(short, long, value_name = "DIR")]
    pub out: PathBuf,
}

#[derive(Args, Debug)]
#[command(after_help = "Example:\n  rlrig world redraw --count 4800 --seed 17 --out runs/redrawn")]
pub struct WorldRedraw {
    /// Which split
    #[arg(long, value_name = "NAME", default_value = "train")]
    pub split: String,
    /// How many pictures
    #[arg(long, value_name = "N", default_value_t = 480)]
    pub count: usize,
    /// The same seed gives the same pictures
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub seed: u64,
    /// A new or empty folder
    #[arg(short, long, value_name = "DIR")]
    pub out: PathBuf,
    /// No progress on stderr
    #[arg(short, long)]
    pub quiet: bool,
    #[command(flatten)]
    pub painter: PainterArgs,
    #[command(flatten)]
    pub models: ModelArgs,
}

#[derive(Args, Debug)]
pub struct WorldOracle {
    /// The picture (PNG, JPEG or WebP)
    #[arg(short, long, value_name = "FILE")]
    pub image: PathBuf,
    /// One JSON document on stdout
    #[arg(long)]
    pub json: bool,
}

#[derive(Args, Debug)]
pub struct Models {
    /// One JSON document on stdout
    #[arg(long)]
    pub json: bool,
}

#[derive(Args, Debug)]
pub struct Info {
    /// A PNG made by rlrig
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// The whole trajectory as JSON on stdout
    #[arg(long)]
    pub json: bool,
}

#[derive(Args, Debug)]
pub struct Doctor {
    /// One JSON document on stdout
    #[arg(long)]
    pub json: bool,
}

#[derive(Args, Debug)]
#[command(after_help = "Example:\n  rlrig completions bash > ~/.local/share/bash-completion/completions/rlrig")]
pub struct Completions {
    /// The shell
    #[arg(value_enum)]
    pub shell: clap_complete::Shell,
}
