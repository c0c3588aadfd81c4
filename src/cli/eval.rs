//! The command line of `rlrig eval`.

use super::{CriticArgs, CycleArgs, EditorKind, ModelArgs, OnlyArgs, PainterArgs, Print, Sampling};
use crate::{
    eval::{modes::Mode, wording::Wording},
    flow::Inversion,
};
use clap::{Args, Subcommand, ValueEnum};
use serde::Serialize;
use std::path::PathBuf;

const EVAL_EXAMPLES: &str = "\
Examples:
  rlrig eval --limit 32                                          the loop on the tabletop world, judged by its pixel oracle
  rlrig eval --suite --limit 500 --out eval-tabletop/            every mode on the same prompts and seeds
  rlrig eval --suite --limit 500 --out eval-tabletop/ --resume   go on after a kill
  rlrig eval --dataset laion-sg --data LAION-SG_test.json --min-relations 5 --limit 300 --out eval-compsgen/
  rlrig eval compare eval-tabletop:diffuser eval-tabletop:loop
  rlrig eval --edits --limit 500                                 the Editor by itself
  rlrig eval --verdicts --limit 500                              the Checker and the Actor by themselves";

#[derive(Args, Debug)]
#[command(after_help = EVAL_EXAMPLES, args_conflicts_with_subcommands = true)]
pub struct Eval {
    #[command(subcommand)]
    pub command: Option<EvalCommand>,
    #[command(flatten)]
    pub run: EvalRun,
}

#[derive(Subcommand, Debug)]
pub enum EvalCommand {
    /// Compare two runs, or two modes, on the prompts that both have: paired differences, intervals, p-values
    Compare(EvalCompare),
    /// Join the shards of one evaluation
    Merge(EvalMerge),
    /// Fit the Checker's probabilities to what the pixel oracle says of the pictures of runs
    Calibrate(EvalCalibrate),
}

#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  rlrig eval compare runs/before:loop runs/after:loop\n  rlrig eval compare runs/after:loop@2 runs/after:loop@3"
)]
pub struct EvalCompare {
    /// A run's folder, all its modes or one, at the end or after so many rounds
    #[arg(value_name = "DIR[:MODE[@ROUNDS]]")]
    pub a: String,
    /// The other
    #[arg(value_name = "DIR[:MODE[@ROUNDS]]")]
    pub b: String,
    /// One JSON document on stdout
    #[arg(long)]
    pub json: bool,
}

#[derive(Args, Debug)]
pub struct EvalMerge {
    /// The folders of the shards
    #[arg(value_name = "DIR", required = true, num_args = 1..)]
    pub parts: Vec<PathBuf>,
    /// A new or empty folder
    #[arg(short, long, value_name = "DIR")]
    pub out: PathBuf,
}

#[derive(Args, Debug)]
#[command(after_help = "Example, on scenes that no table is made of:\n  \
    rlrig eval --split val --limit 200 --mode diffuser loop --out val/\n  \
    rlrig eval calibrate val/ --out VLM_FOLDER/calibration.json")]
pub struct EvalCalibrate {
    /// Folders of runs on the tabletop world with this Checker
    #[arg(value_name = "DIR", required = true, num_args = 1..)]
    pub runs: Vec<PathBuf>,
    /// Where the calibration goes; a VLM's folder is read with the calibration.json in it [default: stdout]
    #[arg(short, long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// Overwrite a file that exists
    #[arg(long)]
    pub force: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Dataset {
    /// The built-in world, with its pixel oracle
    #[default]
    Tabletop,
    /// LAION-SG's JSON
    LaionSg,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PictureGraph {
    /// As LAION-SG's authors have it
    Listed,
    /// Claim by claim; what is too much costs nothing
    Confirmed,
}

/// A role of the loop that the pixel oracle can play.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum OracleRole {
    /// Judges pictures by their pixels
    Checker,
    /// Asks for an edit that mends something
    Actor,
}

#[derive(Args, Debug)]
pub struct EvalRun {
    /// What to evaluate on
    #[arg(long, value_enum, value_name = "D", default_value_t, help_heading = "Data")]
    pub dataset: Dataset,
    /// LAION-SG's JSON file, a folder with it, or its id on the hub [default: mengcy/LAION-SG]
    #[arg(long, value_name = "FILE|DIR|ID", help_heading = "Data")]
    pub data: Option<PathBuf>,
    /// Which splits: of the world train, train-4-5, val, val-4-5, test, test-unseen, test-4-5, test-paraphrase
    #[arg(long, value_name = "NAME", num_args = 1.., default_value = "test", help_heading = "Data")]
    pub split: Vec<String>,
    /// How many prompts of each split, edits or pictures [default: 500 of the tabletop world, all of a file]
    #[arg(long, visible_alias = "count", value_name = "N", help_heading = "Data")]
    pub limit: Option<usize>,
    /// Which scenes of the world; of a file a random subset instead of the first prompts
    #[arg(long, value_name = "S", help_heading = "Data")]
    pub subset_seed: Option<u64>,
    /// Prompts with at least this many objects
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Data")]
    pub objects: usize,
    /// Prompts with at least this many relations (5 for CompSGen Bench)
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Data")]
    pub min_relations: usize,
    /// Prompts that say one of these relations, such as "behind" or "in front of"
    #[arg(long, value_name = "R", num_args = 1.., help_heading = "Data")]
    pub relation: Vec<String>,
    /// Only relations that say where things are
    #[arg(long, help_heading = "Data")]
    pub spatial_only: bool,
    /// Part I of N, counted from 1; `rlrig eval merge` joins them
    #[arg(long, value_name = "I/N", help_heading = "Data")]
    pub shard: Option<String>,
    /// How prompts are worded [default: of tabletop plain for the built-in Diffuser and caption for others,
    /// triples of laion-sg]
    #[arg(long, value_enum, value_name = "W", help_heading = "Data")]
    pub wording: Option<Wording>,

    /// The graph of a picture, which SG-IoU compares: what the judge lists in the words of the one asked for, or what it
    /// confirms of that one [default: confirmed for tabletop, listed for laion-sg]
    #[arg(long, value_enum, value_name = "G", help_heading = "Data")]
    pub graph: Option<PictureGraph>,

    /// How pictures are made [default: loop]
    #[arg(long, value_enum, value_name = "NAME", num_args = 1.., conflicts_with = "suite", help_heading = "Modes")]
    pub mode: Vec<Mode>,
    /// Every mode that the adapters make different (best-of-n and rewrite cost what the loop may only with --editor reference)
    #[arg(long, help_heading = "Modes")]
    pub suite: bool,
    /// Single edits of the world's renders instead of prompts
    // Refused beside it is what it would not heed: all that is about prompts, the loop and who judges it.
    #[arg(
        long,
        conflicts_with_all = [
            "data", "min_relations", "relation", "spatial_only", "shard", "wording", "graph", "mode", "suite", "rounds", "draws",
            "redraw", "accept", "looks", "only", "oracle", "vlm", "judge", "resume",
        ],
        help_heading = "Modes"
    )]
    pub edits: bool,
    /// Verdicts on the world's renders, what is to mend them, and the reading of captions, instead of prompts
    // It looks at pictures and makes none.
    #[arg(
        long,
        conflicts_with_all = [
            "data", "min_relations", "relation", "spatial_only", "shard", "wording", "graph", "mode", "suite", "edits",
            "seed", "rounds", "draws", "redraw", "accept", "editor", "inversion", "only", "oracle", "model", "judge",
            "steps", "solver", "guidance", "edit_guidance", "image_guidance", "resume",
        ],
        help_heading = "Modes"
    )]
    pub verdicts: bool,
    /// Seeds of the noise, one picture of each prompt for each; --edits takes one
    #[arg(long, value_name = "N", num_args = 1.., default_value = "0", help_heading = "Modes")]
    pub seed: Vec<u64>,
    #[command(flatten)]
    pub only: OnlyArgs,

    #[command(flatten)]
    pub cycle: CycleArgs,
    /// How pictures are edited
    #[arg(long, value_enum, value_name = "E", default_value_t, help_heading = "The loop")]
    pub editor: EditorKind,
    /// How a picture is inverted to noise, with --editor inversion [default: rf-inversion]
    #[arg(long, value_enum, value_name = "I", help_heading = "The loop")]
    pub inversion: Option<Inversion>,
    /// Roles that the pixel oracle plays, to see what a perfect one would gain (of the tabletop world)
    #[arg(long, value_enum, value_name = "ROLE", num_args = 1.., help_heading = "The loop")]
    pub oracle: Vec<OracleRole>,
    /// Prompts that are worked on at once; the results do not depend on it
    #[arg(long, value_name = "N", default_value_t = 32, help_heading = "The loop")]
    pub batch: usize,

    /// Another VLM than the Checker as the judge: a hub id or a folder
    #[arg(long, value_name = "HUB_ID|DIR", help_heading = "Models")]
    pub judge: Option<String>,

    /// A new or empty folder for results.json, samples.jsonl, tables and pictures; of --edits and --verdicts for edits.json or
    /// verdicts.json and a line for each
    #[arg(short, long, value_name = "DIR", help_heading = "Output")]
    pub out: Option<PathBuf>,
    /// Go on with the folder of --out
    #[arg(long, requires = "out", help_heading = "Output")]
    pub resume: bool,
    #[command(flatten)]
    pub sampling: Sampling,
    #[command(flatten)]
    pub painter: PainterArgs,
    #[command(flatten)]
    pub critic: CriticArgs,
    #[command(flatten)]
    pub models: ModelArgs,
    #[command(flatten)]
    pub print: Print,
}
