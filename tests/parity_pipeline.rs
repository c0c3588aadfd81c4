//! `flow::Klein` against `Flux2KleinPipeline` of diffusers: the folder and the golden files are made by
//! `scripts/make_pipeline_fixtures.py`.

#![allow(clippy::unwrap_used)]

mod golden;

use candle_core::{DType, Device, Tensor};
use golden::{Golden, assert_close, fixture};
use image::RgbImage;
use rlrig::{
    error::Cancelled,
    flow::pipeline::PromptEmbedding,
    flow::{
        Change, FlowEdit, Inversion, Job, Klein, Method, Options, Solver, Unwatched, Velocity, Watch,
        field::pack,
        policy::{Policy, Taken, rollout},
    },
    models::{Adapter, Folder},
};
use serde_json::json;
use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, HashMap},
    fs,
    path::Path,
};

const PROMPTS: [&str; 2] = ["a small red ball to the left of a large blue cube", "a green ring above a cone"];
/// The fixture's pictures are 96 x 64.
const SIZE: (usize, usize) = (4, 6);

fn open() -> Klein {
    Klein::open(&Folder::from(fixture("klein")), DType::F32, &Device::Cpu, Vec::new()).unwrap()
}

fn golden() -> Golden {
    Golden::open("klein/golden.safetensors")
}

fn options(steps: usize, guidance: f64) -> Options<'static> {
    Options { steps, solver: Solver::Euler, guidance: guidance.into(), batch: 8, watch: &Unwatched }
}

fn job<'a>(klein: &Klein, prompt: &'a str, seed: u64, references: Vec<Tensor>) -> Job<'a> {
    Job { prompt, noise: klein.noise(seed, 0, SIZE).unwrap(), references }
}

fn reference() -> RgbImage {
    image::open(fixture("klein/reference.png")).unwrap().to_rgb8()
}

/// `(B, h w, C)`.
fn tokens(latents: &[Tensor]) -> Tensor {
    Tensor::stack(&latents.iter().map(|l| pack(l).unwrap()).collect::<Vec<_>>(), 0).unwrap()
}

fn same(a: &Tensor, b: &Tensor) -> bool {
    let numbers = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    a.dims() == b.dims() && numbers(a) == numbers(b)
}

/// Compares with the run `name` of the reference, to the latents and to the pixels.
fn check(klein: &Klein, name: &str, drawn: &[Tensor]) {
    let golden = golden();
    assert_close(name, &tokens(drawn), &golden.get(&format!("{name}.latents")), 1e-4);
    let pictures = klein.decode(drawn).unwrap();
    let want = golden.get(&format!("{name}.pictures")); // (B, H, W, 3) in [0, 1]
    for (i, picture) in pictures.iter().enumerate() {
        assert_eq!(picture.dimensions(), (96, 64));
        let want: Vec<f32> = want.get(i).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        for (got, want) in picture.as_raw().iter().zip(want) {
            assert!((f32::from(*got) - 255.0 * want).abs() < 0.51, "{name}: {got} where {} is due", 255.0 * want);
        }
    }
}

#[test]
fn text_to_image_is_that_of_diffusers_with_and_without_guidance() {
    let klein = open();
    let noise = klein.given_noise(&golden().get("noise"), SIZE).unwrap();
    let jobs: Vec<Job> =
        PROMPTS.into_iter().zip(noise).map(|(prompt, noise)| Job { prompt, noise, references: Vec::new() }).collect();
    check(&klein, "guided", &klein.draw(&jobs, &options(4, 4.0)).unwrap());
    assert_eq!(klein.evaluations(), 2 * 2 * 4);
    check(&klein, "plain", &klein.draw(&jobs, &options(3, 1.0)).unwrap());
    assert_eq!(klein.evaluations(), 2 * 2 * 4 + 2 * 3);
}

#[test]
fn editing_with_a_reference_is_that_of_diffusers() {
    let klein = open();
    let encoded = klein.encode(&reference()).unwrap();
    assert_close("the encoded reference", &encoded.unsqueeze(0).unwrap(), &golden().get("reference"), 1e-4);
    let noise = klein.given_noise(&golden().get("noise"), SIZE).unwrap().remove(0);
    let drawn = klein.draw(&[Job { prompt: PROMPTS[1], noise, references: vec![encoded] }], &options(4, 2.5)).unwrap();
    check(&klein, "edit", &drawn);
}

#[test]
fn half_precision_draws_nearly_the_same_picture() {
    let noise = golden().get("noise");
    let draw = |dtype| {
        let klein = Klein::open(&Folder::from(fixture("klein")), dtype, &Device::Cpu, Vec::new()).unwrap();
        let noise = klein.given_noise(&noise, SIZE).unwrap().remove(0);
        klein.draw(&[Job { prompt: PROMPTS[0], noise, references: Vec::new() }], &options(4, 2.0)).unwrap().remove(0)
    };
    let full = draw(DType::F32);
    for dtype in [DType::BF16, DType::F16] {
        let half = draw(dtype);
        assert_eq!(half.dtype(), DType::F32, "latents stay in f32");
        assert_close(&format!("{dtype:?}"), &half, &full, 0.05);
    }
}

#[test]
fn embeddings_are_kept_until_they_are_forgotten() {
    fn shared_between_threads<T: Send + Sync>(_: &T) {}
    let klein = open();
    shared_between_threads(&klein);
    let first = klein.embed(&["a", "b", "a"]).unwrap();
    assert_eq!(first[0].id(), first[2].id());
    assert!(!same(&first[0], &first[1]));
    assert_eq!(klein.embed(&["b"]).unwrap()[0].id(), first[1].id());
    klein.forget();
    let again = klein.embed(&["b"]).unwrap();
    assert!(again[0].id() != first[1].id() && same(&again[0], &first[1]));
}

#[test]
fn a_picture_is_the_same_alone_and_in_any_batch() {
    let klein = open();
    let reference = klein.encode(&reference()).unwrap();
    // Two prompts, three seeds, references and none, in one call that must sort them.
    let jobs: Vec<Job> = (0..6)
        .map(|i| {
            let references = if i % 3 == 2 { vec![reference.clone()] } else { Vec::new() };
            job(&klein, PROMPTS[i % 2], i as u64 / 2, references)
        })
        .collect();
    let together = klein.draw(&jobs, &options(3, 3.0)).unwrap();
    let small = klein.draw(&jobs, &Options { batch: 2, ..options(3, 3.0) }).unwrap();
    for (i, job) in jobs.iter().enumerate() {
        klein.forget();
        let alone = klein.draw(std::slice::from_ref(job), &options(3, 3.0)).unwrap();
        assert!(same(&together[i], &alone[0]), "picture {i} depends on its batch");
        assert!(same(&together[i], &small[i]), "picture {i} depends on the size of its batch");
    }
    assert!(!same(&together[0], &together[1]) && !same(&together[0], &together[4]));
}

#[test]
fn noise_is_read_in_both_layouts_and_refused_in_others() {
    let klein = open();
    let noise = golden().get("noise"); // (2, 16, 4, 6)
    let packed = noise.flatten_from(2).unwrap().transpose(1, 2).unwrap();
    let all = klein.given_noise(&noise, SIZE).unwrap();
    let from_packed = klein.given_noise(&packed, SIZE).unwrap();
    assert_eq!((all.len(), from_packed.len()), (2, 2));
    assert!(same(&all[1], &from_packed[1]) && same(&all[1], &noise.get(1).unwrap()));
    assert!(same(&klein.given_noise(&packed.get(1).unwrap(), SIZE).unwrap()[0], &all[1]));
    assert!(same(&klein.given_noise(&noise.get(0).unwrap(), SIZE).unwrap()[0], &all[0]));
    let error = klein.given_noise(&noise, (6, 4)).unwrap_err().to_string();
    assert!(error.contains("(B, 16, 6, 4)"), "{error}");
    let broken = (noise / 0.0).unwrap();
    assert!(klein.given_noise(&broken, SIZE).unwrap_err().to_string().contains("finite"));
}

#[test]
fn every_way_of_editing_by_noise_keeps_what_the_prompt_does_not_change() {
    let klein = open();
    let source = klein.encode(&reference()).unwrap().narrow(2, 0, 6).unwrap().contiguous().unwrap(); // (16, 5, 6)
    let change = |prompt, method| {
        let klein = open();
        let job = Change { source: source.clone(), source_prompt: PROMPTS[0], prompt, seed: 3 };
        let guidance = if matches!(method, Method::FlowEdit(..)) { 1.5 } else { 1.0 };
        let drawn = klein.change(&[job], method, &options(7, guidance)).unwrap().remove(0);
        (drawn, klein.evaluations())
    };
    let flow_edit = Method::FlowEdit(FlowEdit::for_steps(7), 1.5);
    let (unchanged, evaluations) = change(PROMPTS[0], flow_edit);
    assert!(same(&unchanged, &source), "equal prompts change nothing");
    assert_eq!(evaluations, 2 * 2 * 6);
    assert!(!same(&change(PROMPTS[1], flow_edit).0, &source));
    for (inversion, evaluations) in [(Inversion::RfInversion, 14), (Inversion::RfSolver, 28), (Inversion::FireFlow, 16)]
    {
        let (drawn, counted) = change(PROMPTS[1], Method::Inversion(inversion));
        assert_eq!((drawn.dims(), counted), (source.dims(), evaluations));
        assert!(!same(&drawn, &change(PROMPTS[0], Method::Inversion(inversion)).0), "{inversion:?} ignores the prompt");
    }
}

#[test]
fn a_watched_run_tells_its_progress_and_can_be_cancelled() {
    struct Stopwatch(RefCell<Vec<(usize, usize)>>, Cell<usize>);
    impl Watch for Stopwatch {
        fn progress(&self, done: usize, total: usize) {
            self.0.borrow_mut().push((done, total));
        }
        fn cancelled(&self) -> bool {
            self.0.borrow().len() >= self.1.get()
        }
    }
    let klein = open();
    let jobs = [job(&klein, PROMPTS[0], 0, Vec::new()), job(&klein, PROMPTS[1], 0, Vec::new())];
    let watch = Stopwatch(RefCell::default(), Cell::new(usize::MAX));
    let options = Options { watch: &watch, batch: 1, ..options(2, 2.0) };
    klein.draw(&jobs, &options).unwrap();
    assert_eq!(watch.0.take(), [(1, 4), (2, 4), (3, 4), (4, 4)]);
    watch.1.set(3);
    let error = klein.draw(&jobs, &options).unwrap_err();
    assert!(error.is::<Cancelled>(), "{error:#}");
    assert_eq!(watch.0.take().len(), 3);
}

#[test]
fn a_policy_over_the_pipeline_is_the_pipeline_and_trains_its_adapter() {
    let adapter = Adapter::fresh(2, 4.0, vec!["to_q".to_owned(), "to_out.0".to_owned()], 0);
    let klein = Klein::open(&Folder::from(fixture("klein")), DType::F32, &Device::Cpu, vec![adapter.clone()]).unwrap();
    let job = job(&klein, PROMPTS[0], 5, Vec::new());
    let drawn = klein.draw(std::slice::from_ref(&job), &options(4, 1.0)).unwrap().remove(0);
    let field = klein.field(&[job.prompt], &[Vec::new()], SIZE, 1.0).unwrap();
    let start = pack(&job.noise).unwrap().unsqueeze(0).unwrap();
    let sigmas = klein.schedule.sigmas(4, 24);
    let draw = |step: usize| pack(&klein.noise(1, step as u64, SIZE)?)?.unsqueeze(0);
    let still = Policy { noise: Some(0.0), ..Policy::default() };
    let (end, _) = rollout(&field, &start, &sigmas, still, 0..3, draw).unwrap();
    assert!(same(&end, &tokens(&[drawn])), "without noise a policy is plain drawing");

    let (_, taken) = rollout(&field, &start, &sigmas, Policy::default(), 0..2, draw).unwrap();
    let replay = |t: &Taken| {
        let v = field.velocity(&t.x, t.step.sigma, t.index).unwrap();
        t.step.log_prob(&t.step.mean(&t.x, &v).unwrap(), &t.next).unwrap()
    };
    let again: Vec<Tensor> = taken.iter().map(replay).collect();
    for (again, t) in again.iter().zip(&taken) {
        assert!(same(again, &t.log_prob), "before the first update every ratio is 1");
        assert!(!t.log_prob.track_op() && !t.next.track_op(), "a rollout keeps no graph");
    }
    let loss = again.iter().map(|l| l.sum_all().unwrap()).reduce(|a, b| (a + b).unwrap()).unwrap();
    let gradients = loss.backward().unwrap();
    let vars = adapter.vars();
    assert!(!vars.is_empty());
    for (name, var) in vars.iter().filter(|(name, _)| name.contains("lora_B")) {
        assert!(gradients.get(var.as_tensor()).is_some(), "{name} gets no gradient");
    }
}

#[test]
fn what_cannot_be_drawn_is_refused_in_words() {
    let klein = open();
    let one = [job(&klein, PROMPTS[0], 0, Vec::new())];
    let refused = |options: Options, word: &str| {
        let error = klein.draw(&one, &options).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    };
    refused(options(0, 1.0), "steps");
    refused(options(4, f64::NAN), "guidance");
    refused(Options { batch: 0, ..options(4, 1.0) }, "batch");
    assert!(klein.tokens(15, 64).unwrap_err().to_string().contains("15x64"));
    assert_eq!(klein.tokens(100, 64).unwrap(), SIZE);
    let nan = Job { noise: (one[0].noise.clone() / 0.0).unwrap(), ..one[0].clone() };
    assert!(klein.draw(&[nan], &options(1, 1.0)).unwrap_err().to_string().contains("not finite"));
    let other = Job { references: vec![Tensor::zeros((8, 2, 2), DType::F32, &Device::Cpu).unwrap()], ..one[0].clone() };
    assert!(klein.draw(&[other], &options(1, 1.0)).is_err());
}

/// Opens a copy of the fixture's folder after a change to it.
fn changed(change: &dyn Fn(&Path)) -> anyhow::Result<Klein> {
    let dir = tempfile::tempdir().unwrap();
    for entry in ["transformer", "vae", "text_encoder", "tokenizer", "scheduler"] {
        fs::create_dir(dir.path().join(entry)).unwrap();
        for file in fs::read_dir(fixture("klein").join(entry)).unwrap() {
            let file = file.unwrap();
            fs::copy(file.path(), dir.path().join(entry).join(file.file_name())).unwrap();
        }
    }
    fs::copy(fixture("klein").join("model_index.json"), dir.path().join("model_index.json")).unwrap();
    change(dir.path());
    Klein::open(&Folder::from(dir.path()), DType::F32, &Device::Cpu, Vec::new())
}

/// The subfolder of a model and the stem of its file.
type Part = (&'static str, &'static str);
const TRANSFORMER: Part = ("transformer", "diffusion_pytorch_model");
const TEXT_ENCODER: Part = ("text_encoder", "model");
const VAE: Part = ("vae", "diffusion_pytorch_model");

/// Casts the tensors of a part to one precision after the other.
fn cast(folder: &Path, (sub, stem): Part, dtypes: &[DType]) {
    let file = folder.join(sub).join(format!("{stem}.safetensors"));
    let mut tensors = candle_core::safetensors::load(&file, &Device::Cpu).unwrap();
    for tensor in tensors.values_mut() {
        *tensor = dtypes.iter().fold(tensor.clone(), |tensor, dtype| tensor.to_dtype(*dtype).unwrap());
    }
    candle_core::safetensors::save(&tensors, file).unwrap();
}

/// Splits the file of a part into two shards and their index, as `save_pretrained` lays out large models.
fn shard(folder: &Path, (sub, stem): Part) {
    let folder = folder.join(sub);
    let whole = folder.join(format!("{stem}.safetensors"));
    let tensors = candle_core::safetensors::load(&whole, &Device::Cpu).unwrap();
    let mut tensors: Vec<(String, Tensor)> = tensors.into_iter().collect();
    tensors.sort_by(|(a, _), (b, _)| a.cmp(b));
    fs::remove_file(whole).unwrap();
    let mut map = BTreeMap::new();
    for (number, part) in (1..).zip(tensors.chunks(tensors.len().div_ceil(2))) {
        let name = format!("{stem}-0000{number}-of-00002.safetensors");
        let part: HashMap<&String, Tensor> = part.iter().map(|(key, tensor)| (key, tensor.clone())).collect();
        candle_core::safetensors::save(&part, folder.join(&name)).unwrap();
        map.extend(part.into_keys().map(|key| (key, name.clone())));
    }
    let index = json!({ "metadata": { "total_size": 0 }, "weight_map": map });
    fs::write(folder.join(format!("{stem}.safetensors.index.json")), index.to_string()).unwrap();
}

#[test]
fn shards_change_nothing_and_half_precision_on_disk_rounds_the_weights() {
    // Latents, and the pixels they are decoded to.
    let drawn = |change: &dyn Fn(&Path)| {
        let klein = changed(change).unwrap();
        let latents = klein.draw(&[job(&klein, PROMPTS[0], 0, Vec::new())], &options(2, 2.0)).unwrap().remove(0);
        let pixels = klein.autoencoder.pixels(&latents.unsqueeze(0).unwrap()).unwrap();
        Tensor::cat(&[latents.flatten_all().unwrap(), pixels.flatten_all().unwrap()], 0).unwrap()
    };
    let plain = drawn(&|_| ());
    for parts in [&[TRANSFORMER][..], &[VAE], &[TRANSFORMER, TEXT_ENCODER]] {
        let each = |change: &dyn Fn(Part)| parts.iter().for_each(|part| change(*part));
        let sharded = drawn(&|folder| each(&|part| shard(folder, part)));
        assert!(same(&sharded, &plain), "{parts:?}");
        let rounded = drawn(&|folder| each(&|part| cast(folder, part, &[DType::BF16, DType::F32])));
        assert!(!same(&rounded, &plain), "{parts:?}");
        let half = drawn(&|folder| each(&|part| cast(folder, part, &[DType::BF16])));
        assert!(same(&half, &rounded), "{parts:?}");
        let both = drawn(&|folder| {
            each(&|part| {
                cast(folder, part, &[DType::BF16]);
                shard(folder, part);
            });
        });
        assert!(same(&both, &rounded), "{parts:?}");
    }
}

#[test]
fn what_a_model_in_shards_lacks_is_named() {
    let refused = |change: &dyn Fn(&Path)| {
        let opened = changed(&|folder| {
            shard(folder, TRANSFORMER);
            change(&folder.join("transformer"));
        });
        format!("{:#}", opened.err().unwrap())
    };
    let index = "diffusion_pytorch_model.safetensors.index.json";
    let second = "diffusion_pytorch_model-00002-of-00002.safetensors";
    let missing = refused(&|folder| fs::remove_file(folder.join(second)).unwrap());
    assert!(missing.contains(second), "{missing}");
    let cut = refused(&|folder| {
        let bytes = fs::read(folder.join(second)).unwrap();
        fs::write(folder.join(second), &bytes[..bytes.len() - 100]).unwrap();
    });
    assert!(cut.contains(second) && cut.contains("no whole safetensors file"), "{cut}");
    let lacking = refused(&|folder| {
        let mut tensors = candle_core::safetensors::load(folder.join(second), &Device::Cpu).unwrap();
        assert!(tensors.remove("x_embedder.weight").is_some());
        candle_core::safetensors::save(&tensors, folder.join(second)).unwrap();
    });
    assert!(lacking.contains(&format!("transformer/{second} lacks the tensor x_embedder.weight")), "{lacking}");
    // An index reaches no file outside its folder.
    let outside = refused(&|folder| {
        let text = fs::read_to_string(folder.join(index)).unwrap();
        fs::write(folder.join(index), text.replace(second, &format!("../{second}"))).unwrap();
    });
    assert!(outside.contains(&format!("\"../{second}\", which is no file of the folder")), "{outside}");
    let broken = refused(&|folder| fs::write(folder.join(index), "{}").unwrap());
    assert!(broken.contains(index) && broken.contains("weight_map"), "{broken}");
}

#[test]
fn prompts_are_embedded_as_in_diffusers_unless_a_config_says_otherwise() {
    let text = fs::read_to_string(fixture("klein").join("defaults.json")).unwrap();
    assert_eq!(PromptEmbedding::default(), serde_json::from_str(&text).unwrap());
}

#[test]
fn a_folder_that_is_no_klein_is_refused_in_words() {
    let edit = |file: &'static str, from: &'static str, to: &'static str| {
        let result = changed(&|path| {
            let text = fs::read_to_string(path.join(file)).unwrap();
            assert!(text.contains(from), "{file} has {from}");
            fs::write(path.join(file), text.replace(from, to)).unwrap();
        });
        format!("{:#}", result.err().unwrap())
    };
    assert!(changed(&|_| ()).is_ok());
    assert!(edit("model_index.json", "Flux2KleinPipeline", "FluxPipeline").contains("FluxPipeline"));
    let shrunk = edit("text_encoder/config.json", "\"max_length\": 40", "\"max_length\": 0");
    assert!(shrunk.contains("max_length: 0"), "{shrunk}");
    let fewer = edit("text_encoder/config.json", "      1,\n", "");
    assert!(fewer.contains("joint_attention_dim"), "{fewer}");
    let missing = changed(&|path| fs::remove_dir_all(path.join("vae")).unwrap()).err().unwrap().to_string();
    assert!(missing.contains("no folder vae/"), "{missing}");
}
