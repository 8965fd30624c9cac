//! `paceline imatrix`: which columns of a model's matrices count, for [`quantize`](crate::quantize).
//!
//! A text is cut into windows as for [`perplexity`](crate::perplexity) and computed; of every product the squares of its inputs are
//! summed, column by column. What an expert sees is summed for it alone. Head and embedding are left out, as llama-imatrix does:
//! their inputs are no better known than the text. So are prediction heads, which no forward of the target runs.

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    sync::{Arc, Mutex},
};

use anyhow::{Context, Result, ensure};
use clap::Args;
use paceline_backend::{
    Backend, Error, Exec, Plan, PlanBuilder, PlanWork, ProductInput, StateConfig, StateDecl, States, Step,
    StepOut, WeightId, WeightSource, cpu::CpuBackend,
};
use paceline_convert::{Sums, write_importances};
use paceline_memory::Memory;
use paceline_text::Tokenizer;

use crate::{
    flags::{ModelFlags, SizeFlags},
    later_flags::LaterFlags,
    load::bytes,
    output::say,
    perplexity::window::{N_CTX_DEFAULT, windows_of},
    progress,
    sources::Source,
};

/// Collects an importance matrix: which columns of a model's matrices count over a text
#[derive(Args, Debug)]
pub struct ImatrixArgs {
    #[command(flatten)]
    model: ModelFlags,
    /// Text to compute
    #[arg(short, long, value_name = "FILE")]
    file: PathBuf,
    /// File to write, in GGUF
    #[arg(
        short,
        long = "output-file",
        visible_alias = "output",
        value_name = "FILE",
        default_value = "imatrix.gguf"
    )]
    out: PathBuf,
    /// Most windows of the text; -1 is all
    #[arg(long, value_name = "N", default_value_t = -1, allow_negative_numbers = true)]
    chunks: i64,
    /// Reads the texts of control tokens, such as turn markers, as these tokens
    #[arg(long)]
    parse_special: bool,
    #[command(flatten)]
    sizes: SizeFlags,
    #[command(flatten)]
    later: LaterFlags,
}

/// Bytes of inputs that are kept at once, as far as single rows allow.
const INPUT_BYTES: usize = 512 << 20;

/// Runs it.
pub fn run(args: ImatrixArgs) -> Result<()> {
    for words in args.later.check()? {
        eprintln!("{words}");
    }
    let n_ctx = args.sizes.ctx_size.filter(|&n| n > 0).unwrap_or(N_CTX_DEFAULT) as usize;
    let file = Arc::new(Source::target(&args.model)?.open()?);
    let cpu = CpuBackend::new(args.sizes.n_threads())?.on_progress(progress::packing());
    let named = Arc::new(Named { inner: Arc::new(cpu), names: Mutex::default() });
    let backend: Arc<dyn Backend> = named.clone();
    let model = paceline_models::load(&file, &backend)?;
    let tokenizer = Tokenizer::from_metadata(file.metadata())
        .with_context(|| format!("{}: the tokenizer can't be used", file.name()))?;
    let tokens = windows_of(&args.file, &tokenizer, n_ctx, args.chunks, args.parse_special)?;
    let n_vocab = model.hparams().n_vocab;
    ensure!(tokens.iter().all(|&t| (t as usize) < n_vocab), "{}: tokens beyond the embedding", file.name());

    let mut plan = PlanBuilder::new(&[]);
    let logits = model.record(&mut plan);
    let (plan, inputs) = plan.finish_with_inputs(Some(logits));
    let config = StateConfig { kv: args.sizes.kv_types().0, ..StateConfig::default() };
    let states = backend.alloc_states(model.states(), config)?;
    let mut exec = backend.compile(Arc::new(plan), &states)?;
    let mut memory = Memory::new(states, n_ctx);
    let width = inputs.iter().map(|input| input.column + input.width()).max().unwrap_or(0);
    let n_row_max = (INPUT_BYTES / (4 * width.max(1))).clamp(1, args.sizes.n_ubatch()?);

    let mut collector = Collector::new(inputs);
    let mut out = StepOut::default();
    let n_chunk = tokens.len() / n_ctx;
    let bar = progress::windows(n_chunk);
    for window in tokens.chunks_exact(n_ctx) {
        let seq = memory.create();
        for (i, tokens) in window.chunks(n_row_max).enumerate() {
            let n = tokens.len();
            memory.prepare(seq, n, n)?;
            let positions: Vec<u32> = ((i * n_row_max) as u32..).take(n).collect();
            let lanes = [memory.lane(seq, 0)];
            exec.run(
                &Step { tokens, inputs: &[], positions: &positions, lanes: &lanes, outputs: &[] },
                &mut out,
            );
            memory.commit(seq, n);
            for row in out.taps.chunks_exact(out.taps_width).take(n) {
                collector.add(row);
            }
        }
        memory.free(seq);
        bar.inc(1);
    }
    bar.finish_and_clear();

    let names = named.names.lock().map_err(|_| anyhow::anyhow!("a thread panicked"))?;
    let sums = collector.finish(&names);
    let is_finite = |sums: &Sums| sums.squares.iter().all(|x| x.is_finite());
    if let Some((name, _)) = sums.iter().find(|(_, sums)| !is_finite(sums)) {
        anyhow::bail!("{name}: inputs that are not finite");
    }
    let dataset = args.file.file_name().unwrap_or_default().to_string_lossy();
    write_importances(&args.out, &sums, &dataset, n_chunk as u32, n_ctx as u32)?;
    let n_unseen: usize = sums.values().map(|sums| sums.counts.iter().filter(|&&n| n == 0.0).count()).sum();
    if n_unseen > 0 {
        eprintln!(
            "note: {n_unseen} matrices of experts saw no token: a longer or more varied text would tell"
        );
    }
    say(format_args!(
        "{}: {} tensors over {n_chunk} windows of {n_ctx} tokens, {}",
        args.out.display(),
        sums.len(),
        bytes(std::fs::metadata(&args.out)?.len())
    ))
}

/// Sums over rows of inputs.
struct Collector {
    inputs: Vec<ProductInput>,
    /// By the place of an input in a row, and the width: several products read one input.
    dense: BTreeMap<(usize, usize), Vec<f64>>,
    /// By input: squares of all experts, and rows that each has seen.
    experts: Vec<Option<(Vec<f64>, Vec<u64>)>>,
    n_row: u64,
}

impl Collector {
    fn new(inputs: Vec<ProductInput>) -> Collector {
        let dense = inputs.iter().filter(|input| input.experts.is_none());
        let dense = dense.map(|input| ((input.column, input.n_in), vec![0.0; input.n_in])).collect();
        let experts = (inputs.iter())
            .map(|input| {
                let experts = input.experts.as_ref()?;
                Some((vec![0.0; experts.n_expert * input.n_in], vec![0; experts.n_expert]))
            })
            .collect();
        Collector { inputs, dense, experts, n_row: 0 }
    }

    fn add(&mut self, row: &[f32]) {
        fn add(sums: &mut [f64], x: &[f32]) {
            sums.iter_mut().zip(x).for_each(|(sum, &x)| *sum += f64::from(x) * f64::from(x));
        }
        self.n_row += 1;
        for (&(column, n_in), sums) in &mut self.dense {
            add(sums, &row[column..column + n_in]);
        }
        for (input, sums) in self.inputs.iter().zip(&mut self.experts) {
            let (Some(experts), Some((squares, counts))) = (&input.experts, sums) else { continue };
            let n_in = input.n_in;
            for (slot, &id) in row[experts.ids_column..][..experts.n_used].iter().enumerate() {
                let e = id as usize;
                let x = input.column + if experts.per_slot { slot * n_in } else { 0 };
                add(&mut squares[e * n_in..(e + 1) * n_in], &row[x..x + n_in]);
                counts[e] += 1;
            }
        }
    }

    fn finish(self, names: &HashMap<WeightId, String>) -> BTreeMap<String, Sums> {
        let narrow = |sums: &[f64]| sums.iter().map(|&x| x as f32).collect();
        (self.inputs.iter().zip(&self.experts))
            .filter_map(|(input, experts)| {
                let sums = match experts {
                    Some((squares, counts)) => {
                        Sums { squares: narrow(squares), counts: counts.iter().map(|&n| n as f32).collect() }
                    }
                    None => Sums {
                        squares: narrow(&self.dense[&(input.column, input.n_in)]),
                        counts: vec![self.n_row as f32],
                    },
                };
                Some((names.get(&input.weight)?.clone(), sums))
            })
            .collect()
    }
}

/// A backend that remembers which tensor a weight is.
struct Named {
    inner: Arc<dyn Backend>,
    names: Mutex<HashMap<WeightId, String>>,
}

impl Backend for Named {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn describe(&self) -> String {
        self.inner.describe()
    }

    fn upload(&self, source: &WeightSource) -> Result<WeightId, Error> {
        let id = self.inner.upload(source)?;
        if let Ok(mut names) = self.names.lock() {
            names.insert(id, source.file.tensors()[source.tensor].name.clone());
        }
        Ok(id)
    }

    fn alloc_states(&self, decls: &[StateDecl], config: StateConfig) -> Result<Arc<dyn States>, Error> {
        self.inner.alloc_states(decls, config)
    }

    fn compile(&self, plan: Arc<Plan>, states: &Arc<dyn States>) -> Result<Box<dyn Exec>, Error> {
        self.inner.compile(plan, states)
    }

    fn work(&self, plan: &Plan) -> PlanWork {
        self.inner.work(plan)
    }
}
