//! `paceline serve`: the HTTP server.

use std::{
    fs,
    net::{TcpListener, ToSocketAddrs},
    path::PathBuf,
};

use anyhow::{Context, Result, anyhow, ensure};
use clap::Args;
use paceline_kernels::formats::mix::MIXES;
use paceline_server::{DiskCache, EngineFactory, Reasoning, Server, ServerConfig, ServerModel};

use crate::{
    flags::{LengthFlags, ModelFlags, SamplingFlags, SizeFlags, TemplateFlags, Thinking, switch},
    later_flags::LaterFlags,
    load::{self, Loaded},
};

/// Serves a model over HTTP, with the interfaces of OpenAI and llama-server
#[derive(Args, Debug)]
pub struct ServeArgs {
    #[command(flatten)]
    model: ModelFlags,
    /// Address to listen at
    #[arg(long, value_name = "HOST", env = "LLAMA_ARG_HOST", hide_env = true, default_value = "127.0.0.1")]
    host: String,
    /// Port to listen at; 0 picks a free one
    #[arg(long, value_name = "PORT", env = "LLAMA_ARG_PORT", hide_env = true, default_value_t = 8080)]
    port: u16,
    /// Key that requests must show; several with commas
    #[arg(long, value_name = "KEYS", env = "LLAMA_API_KEY", hide_env_values = true)]
    api_key: Vec<String>,
    /// File with such keys, one a line
    #[arg(long, value_name = "FILE", env = "LLAMA_ARG_API_KEY_FILE", hide_env = true)]
    api_key_file: Option<PathBuf>,
    /// Name of the model; more, with commas, are names that requests may use too (-a)
    #[arg(short, long, value_name = "NAMES", env = "LLAMA_ARG_ALIAS", hide_env = true)]
    alias: Option<String>,
    /// GET /metrics answers (default)
    #[arg(long, env = "LLAMA_ARG_ENDPOINT_METRICS", hide_env = true, value_parser = switch)]
    metrics: bool,
    /// GET /metrics does not answer
    #[arg(long, overrides_with = "metrics")]
    no_metrics: bool,
    /// GET /slots answers (default)
    #[arg(long, env = "LLAMA_ARG_ENDPOINT_SLOTS", hide_env = true, value_parser = switch)]
    slots: bool,
    /// GET /slots does not answer
    #[arg(long, env = "LLAMA_ARG_NO_ENDPOINT_SLOTS", hide_env = true, value_parser = switch, overrides_with = "slots")]
    no_slots: bool,
    /// Folder for POST /slots/{id}?action=save and restore
    #[arg(long, value_name = "DIR", env = "LLAMA_ARG_SLOT_SAVE_PATH", hide_env = true)]
    slot_save_path: Option<PathBuf>,
    /// Folder for cached prompts that have no room in --cache-ram, and for all of them when the server stops: they are
    /// found again at the next start
    #[arg(long, value_name = "DIR", env = "LLAMA_ARG_CACHE_DISK", hide_env = true)]
    cache_disk: Option<PathBuf>,
    /// MiB that this folder may hold [default: 16384]
    #[arg(
        long,
        value_name = "N",
        env = "LLAMA_ARG_CACHE_DISK_SIZE",
        hide_env = true,
        requires = "cache_disk",
        default_value_t = N_DISK_DEFAULT,
        hide_default_value = true
    )]
    cache_disk_size: u64,
    #[command(flatten)]
    length: LengthFlags,
    #[command(flatten)]
    sizes: SizeFlags,
    #[command(flatten)]
    sampling: SamplingFlags,
    #[command(flatten)]
    template: TemplateFlags,
    #[command(flatten)]
    later: LaterFlags,
}

/// MiB of files of cached prompts: about what a disk has to spare, and several conversations of a large model.
const N_DISK_DEFAULT: u64 = 16384;

/// Runs it, until the process is told to stop.
pub fn run(args: ServeArgs) -> Result<()> {
    for words in args.later.check()? {
        tracing::warn!("{words}");
    }
    let config = config(&args)?;
    // Before the model is loaded, which may take a while: a port in use is said at once.
    let listener = listen(&args.host, args.port)?;
    let mut first = disk_cache(&args)?;
    let mut loaded = Loaded::load(&args.model, &args.sizes, &args.template, false)?;
    let model = describe(&args, &loaded)?;
    loaded.announce_and_warm_up()?;
    if args.slot_save_path.is_some() || args.cache_disk.is_some() {
        loaded.probe()?;
    }
    let (folder, n_byte_max) = (args.cache_disk.clone(), args.cache_disk_size.saturating_mul(1 << 20));
    let factory: EngineFactory = Box::new(move || {
        let engine = loaded.planning_engine()?;
        let Some(folder) = &folder else { return Ok(engine) };
        let shelf = match first.take() {
            Some(shelf) => shelf,
            None => DiskCache::open(folder)?,
        };
        Ok(engine.with_shelf(Box::new(shelf), n_byte_max))
    });
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let server = Server::new(config, model, factory).map_err(|error| anyhow!(error))?;
        let address = listener.local_addr()?;
        eprintln!("listening on http://{address}");
        let listener = tokio::net::TcpListener::from_std(listener)?;
        server.serve(listener, asked_to_stop()?).await?;
        Ok(())
    })
}

/// Where cached prompts lie.
fn disk_cache(args: &ServeArgs) -> Result<Option<DiskCache>> {
    let Some(folder) = &args.cache_disk else { return Ok(None) };
    ensure!(
        args.sizes.cache.config()?.is_on(),
        "--cache-disk: expected a prompt cache in front of it, found --cache-ram 0"
    );
    let shelf = DiskCache::open(folder);
    shelf.map(Some).with_context(|| format!("--cache-disk: {}: can't be used", folder.display()))
}

fn listen(host: &str, port: u16) -> Result<TcpListener> {
    let listen = || -> std::io::Result<TcpListener> {
        let addresses: Vec<_> = (host, port).to_socket_addrs()?.collect();
        let listener = TcpListener::bind(&addresses[..])?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    };
    listen().map_err(|error| {
        anyhow!("can't listen at {host}:{port}: {error}\nhint: another server may use the port; choose one with --port")
    })
}

fn config(args: &ServeArgs) -> Result<ServerConfig> {
    let mut api_keys: Vec<String> = (args.api_key.iter())
        .flat_map(|keys| keys.split(','))
        .map(|key| key.trim().to_string())
        .filter(|key| !key.is_empty())
        .collect();
    if let Some(path) = &args.api_key_file {
        let text = fs::read_to_string(path).with_context(|| format!("{}: can't read", path.display()))?;
        let n = api_keys.len();
        api_keys.extend(text.lines().map(str::trim).filter(|key| !key.is_empty()).map(str::to_string));
        // An empty file must not open the door.
        ensure!(api_keys.len() > n, "{}: expected keys, one a line, found none", path.display());
    }
    if let Some(folder) = &args.slot_save_path {
        ensure!(
            folder.is_dir(),
            "--slot-save-path: expected a folder that exists, found {}",
            folder.display()
        );
    }
    Ok(ServerConfig {
        api_keys,
        slots: !args.no_slots,
        metrics: !args.no_metrics,
        build_info: concat!("paceline-", env!("PACELINE_BUILD")).to_string(),
        reasoning: match args.template.thinking()? {
            Thinking::Auto => Reasoning::Auto,
            Thinking::On => Reasoning::On,
            Thinking::Off => Reasoning::Off,
        },
        reasoning_format: args.template.reasoning_format.unwrap_or_default(),
        chat_template_kwargs: args.template.kwargs()?,
        n_predict: usize::try_from(args.length.n_predict).ok(),
        slot_save_path: args.slot_save_path.clone(),
        cache_prompt: !args.sizes.cache.no_cache_prompt,
        ..ServerConfig::default()
    })
}

fn describe(args: &ServeArgs, loaded: &Loaded) -> Result<ServerModel> {
    let names = args.alias.as_deref().unwrap_or(&loaded.name);
    let mut names = names.split(',').map(|name| name.trim().to_string()).filter(|name| !name.is_empty());
    let sampling = args.sampling.params()?;
    sampling.validate(loaded.tokenizer.vocab().len())?;
    let file = &loaded.target_file;
    let mix = file.metadata().u32("general.file_type")?;
    let mix = mix.and_then(|id| MIXES.iter().find(|mix| mix.file_type == id));
    Ok(ServerModel {
        id: names.next().context("--alias: expected a name, found none")?,
        aliases: names.collect(),
        path: file.path().display().to_string(),
        tokenizer: loaded.tokenizer.clone(),
        chat_template: loaded.template.clone(),
        sampling,
        seed: args.sampling.fixed_seed(),
        n_ctx_train: loaded.model.hparams().n_ctx_train,
        n_embd: loaded.model.hparams().n_embd,
        n_params: load::n_params(file),
        size: file.tensors().iter().map(|tensor| tensor.n_bytes).sum(),
        ftype: mix.map_or("mixed".to_string(), |mix| mix.name.to_uppercase()),
        vocab_type: file.metadata().str("tokenizer.ggml.model")?.unwrap_or("none").to_string(),
    })
}

/// Ready at the first SIGTERM or SIGINT; a second one ends the process at once.
#[cfg(unix)]
fn asked_to_stop() -> Result<impl Future<Output = ()> + Send + 'static> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let mut first = async move || {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
    };
    Ok(async move {
        first().await;
        tokio::spawn(async move {
            first().await;
            std::process::exit(130);
        });
    })
}

/// Ready at Ctrl-C.
#[cfg(not(unix))]
fn asked_to_stop() -> Result<impl Future<Output = ()> + Send + 'static> {
    Ok(async {
        let _ = tokio::signal::ctrl_c().await;
    })
}
