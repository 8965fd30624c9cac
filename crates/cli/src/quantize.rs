//! `paceline quantize`: a GGUF file's weights in other types.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Args;
use paceline_convert::quantize::{QuantizeOptions, QuantizePlan, plan};
use paceline_gguf::{GgmlType, Gguf};

use crate::{load, output::say, progress};

/// Gives the weights of a GGUF file other types
#[derive(Args, Debug)]
#[command(
    after_long_help = "Example: paceline quantize model-bf16.gguf model-q4.gguf Q4_K_M --imatrix model.imatrix"
)]
pub struct QuantizeArgs {
    /// File to read, of a split one any part
    input: PathBuf,
    /// File to write
    out: PathBuf,
    /// Mix of types: Q4_K_M, Q4_K_S, Q5_K_M, Q6_K, Q3_K_M, Q2_K, Q8_0, Q4_0, IQ4_XS, IQ4_NL, BF16, F16 …; COPY changes none
    #[arg(value_name = "TYPE")]
    ty: String,
    /// Threads, as the last word of older command lines
    #[arg(hide = true, value_name = "N")]
    n_thread: Option<usize>,
    /// Importance matrix: what columns count, in either form that llama-imatrix writes
    #[arg(long, value_name = "FILE")]
    imatrix: Option<PathBuf>,
    /// One type for all: the mix makes no exceptions
    #[arg(long)]
    pure: bool,
    /// Type of the head (output.weight, or the embedding that is the head too)
    #[arg(long, value_name = "TYPE")]
    output_tensor_type: Option<GgmlType>,
    /// Type of the token embeddings
    #[arg(long, value_name = "TYPE")]
    token_embedding_type: Option<GgmlType>,
    /// Type of the tensors whose names match a regular expression: 'blk\.(0|1)\.ffn_down=q6_k'. May be given several times, the
    /// first that matches counts
    #[arg(long, value_name = "PATTERN=TYPE", value_parser = tensor_type)]
    tensor_type: Vec<(String, GgmlType)>,
    /// File with such pairs, separated by blanks or lines
    #[arg(long, value_name = "FILE")]
    tensor_type_file: Option<PathBuf>,
    /// output.weight stays as it is
    #[arg(long)]
    leave_output_tensor: bool,
    /// Quantises again what is quantised already, which is worse than to begin with F16 or BF16
    #[arg(long)]
    allow_requantize: bool,
    /// Only says what would become of each tensor, and the sizes
    #[arg(long)]
    dry_run: bool,
    /// Threads that search for scales; 0 is one per core
    #[arg(short, long, value_name = "N", default_value_t = 0)]
    threads: usize,
}

/// Runs it.
pub fn run(args: QuantizeArgs) -> Result<()> {
    let source = Gguf::open(&args.input)?;
    let place = |path: &Path| path.canonicalize().ok();
    ensure!(
        place(&args.out).is_none() || place(&args.out) != place(&args.input),
        "{}: would replace the file that is read",
        args.out.display()
    );
    let mut tensor_types = args.tensor_type;
    if let Some(path) = &args.tensor_type_file {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("{}: can't read", path.display()))?;
        let pairs = text.split_whitespace().map(tensor_type).collect::<Result<Vec<_>, _>>();
        tensor_types.extend(pairs.map_err(|why| anyhow::anyhow!("{}: {why}", path.display()))?);
    }
    let options = QuantizeOptions {
        ty: args.ty.clone(),
        importances: args.imatrix,
        pure: args.pure,
        output_type: args.output_tensor_type,
        embedding_type: args.token_embedding_type,
        tensor_types,
        leave_output: args.leave_output_tensor,
        // What would be refused is seen, too.
        allow_requantize: args.allow_requantize || args.dry_run,
        n_thread: args.n_thread.unwrap_or(args.threads),
    };
    let plan = plan(source, &options)?;
    if args.dry_run {
        list(&plan)?;
    } else {
        let bar = progress::bytes(0);
        plan.write(&args.out, |progress| {
            bar.set_length(progress.total_bytes);
            bar.set_position(progress.done_bytes);
            bar.set_message(progress.tensor.to_string());
        })?;
        bar.finish_and_clear();
    }
    remark(&plan, options.importances.is_some(), args.dry_run && !args.allow_requantize);
    let types: Vec<String> = plan.types().iter().map(|(ty, n)| format!("{n} × {ty}")).collect();
    say(format_args!(
        "{}: {} to {}, {:.2} bits a weight, tensors {}",
        if args.dry_run { "dry run".to_string() } else { args.out.display().to_string() },
        load::bytes(plan.source().file_bytes()),
        load::bytes(plan.file_bytes()),
        plan.bits_per_weight(),
        types.join(", ")
    ))
}

/// A line for each tensor.
fn list(plan: &QuantizePlan) -> Result<()> {
    for (info, tensor) in plan.tensors() {
        let shape: Vec<String> = info.shape.iter().map(u64::to_string).collect();
        let change = match tensor.from == tensor.to {
            true => format!("{:>7} stays  ", tensor.from),
            false => format!("{:>7} → {:<5}", tensor.from, tensor.to),
        };
        let sizes = format!("{:>8} → {:>8}", load::bytes(info.n_bytes), load::bytes(tensor.n_bytes));
        say(format_args!("{:<40} {:>22}  {change}  {sizes}", info.name, shape.join(" × ")))?;
    }
    Ok(())
}

/// What went otherwise than asked.
fn remark(plan: &QuantizePlan, has_importances: bool, refuses: bool) {
    for (info, tensor) in plan.tensors() {
        if let Some(wanted) = tensor.instead_of {
            eprintln!(
                "note: {}: rows of {} values are not whole {wanted} blocks, so it is {}",
                info.name, info.shape[0], tensor.to
            );
        }
    }
    let changed = |tensor: &&TensorPair| tensor.1.from != tensor.1.to;
    let pairs: Vec<TensorPair> = plan.tensors().collect();
    let mut deaf = pairs.iter().filter(changed).filter(|(_, t)| t.to.is_quantized() && !t.weighted);
    if has_importances && let Some((first, _)) = deaf.next() {
        eprintln!("note: the matrix has no importances for {} and {} more tensors", first.name, deaf.count());
    }
    if refuses && pairs.iter().filter(changed).any(|(_, t)| t.from.is_quantized()) {
        eprintln!(
            "note: some tensors are quantised already: without --allow-requantize this would be refused"
        );
    }
}

type TensorPair<'a> = (&'a paceline_gguf::TensorInfo, &'a paceline_convert::quantize::TensorPlan);

fn tensor_type(text: &str) -> Result<(String, GgmlType), String> {
    let (pattern, ty) = text.rsplit_once('=').ok_or("expected PATTERN=TYPE")?;
    Ok((pattern.to_string(), ty.parse().map_err(|e: paceline_gguf::Error| e.to_string())?))
}
