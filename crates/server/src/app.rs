//! What all handlers share, the routes, and the life of the server.

use std::{
    future::Future,
    io,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use axum::{
    Router,
    body::Bytes,
    extract::{DefaultBodyLimit, rejection::BytesRejection},
    http::StatusCode,
    middleware,
    routing::{get, post},
    serve::ListenerExt,
};
use paceline_sampling::DryBreakers;
use paceline_text::Encode;
use serde_json::Value;
use tokio::{net::TcpListener, sync::oneshot, task::spawn_blocking, time::timeout};

use crate::{
    auth,
    config::{ServerConfig, ServerModel},
    error::{ApiError, Kind},
    fields::Fields,
    native, openai_chat, openai_completions,
    runner::{EngineFactory, Runner},
    slot_files, status, text_tools,
};

/// A request's body, or why there is none.
pub(crate) type Body = Result<Bytes, BytesRejection>;

/// What all handlers share.
pub(crate) struct App {
    pub config: ServerConfig,
    pub model: ServerModel,
    pub runner: Runner,
    pub started: SystemTime,
    /// The last breakers made: making them visits the whole vocabulary, and clients mostly keep theirs.
    breakers: Mutex<Option<(Vec<String>, Arc<DryBreakers>)>>,
}

impl App {
    /// Refuses a request for another model.
    pub fn check_model(&self, fields: &Fields<'_>) -> Result<(), ApiError> {
        let Some(asked) = fields.string("model")?.filter(|name| !name.is_empty()) else { return Ok(()) };
        let model = &self.model;
        let file = Path::new(&model.path).file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let stem = file.strip_suffix(".gguf").unwrap_or(file);
        let known = [model.id.as_str(), file, stem, model.path.as_str()];
        if known.contains(&asked) || model.aliases.iter().any(|alias| alias == asked) {
            return Ok(());
        }
        let names: Vec<&str> =
            std::iter::once(model.id.as_str()).chain(model.aliases.iter().map(String::as_str)).collect();
        Err(ApiError::new(
            Kind::NotFound,
            format!(
                "`model`: `{asked}` is not served here; known: {} (or leave the field out)",
                names.join(", ")
            ),
        ))
    }

    /// The tokens of DRY's sequence breakers.
    pub fn dry_breakers(&self, texts: &[String]) -> Arc<DryBreakers> {
        let mut last = self.breakers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((known, breakers)) = &*last
            && known == texts
        {
            return breakers.clone();
        }
        let tokenizer = &self.model.tokenizer;
        let vocab = tokenizer.vocab();
        let breakers = Arc::new(DryBreakers::from_vocab(
            texts,
            vocab.len() as u32,
            |token, bytes| bytes.extend_from_slice(vocab.bytes(token, true)),
            |text| tokenizer.encode(text, Encode { add_bos: false, parse_special: false }),
        ));
        *last = Some((texts.to_vec(), breakers.clone()));
        breakers
    }
}

/// Parses a body and makes of it what `parse` says, off the threads that serve connections: templates and
/// tokenizers take their time with long prompts.
pub(crate) async fn prepare<T: Send + 'static>(
    app: &Arc<App>,
    body: Body,
    parse: impl FnOnce(&App, &Value) -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let limit = app.config.body_limit;
    let bytes = body.map_err(|rejection| match rejection.status() {
        StatusCode::PAYLOAD_TOO_LARGE => {
            ApiError::new(Kind::TooLarge, format!("the body is larger than {limit} bytes, the most allowed"))
        }
        _ => ApiError::invalid(format!("the body could not be read: {rejection}")),
    })?;
    let app = app.clone();
    let task = spawn_blocking(move || {
        let body = serde_json::from_slice(&bytes)
            .map_err(|error| ApiError::invalid(format!("the body is not valid JSON: {error}")))?;
        parse(&app, &body)
    });
    task.await.unwrap_or_else(|_| Err(ApiError::server("the request could not be read: this is a bug")))
}

/// A server with its engine, ready to listen.
pub struct Server {
    app: Arc<App>,
}

impl Server {
    /// Makes the engine, on the thread that will step it, and the server around it. `make_engine` is called again
    /// if the engine fails beyond repair, and should keep the weights for that.
    pub fn new(
        config: ServerConfig,
        model: ServerModel,
        make_engine: EngineFactory,
    ) -> Result<Server, Box<dyn std::error::Error + Send + Sync>> {
        let runner = Runner::start(make_engine)?;
        let app = App { config, model, runner, started: SystemTime::now(), breakers: Mutex::new(None) };
        Ok(Server { app: Arc::new(app) })
    }

    /// The routes, for those who bring their own listener.
    pub fn router(&self) -> Router {
        let app = self.app.clone();
        Router::new()
            .route("/health", get(status::health))
            .route("/v1/health", get(status::health))
            .route("/models", get(status::models))
            .route("/v1/models", get(status::models))
            .route("/props", get(status::props).post(status::change_props))
            .route("/slots", get(status::slots))
            .route("/slots/{id}", post(slot_files::slot_action))
            .route("/metrics", get(status::metrics))
            .route("/completion", post(native::completion))
            .route("/completions", post(native::completion))
            .route("/v1/completions", post(openai_completions::completions))
            .route("/chat/completions", post(openai_chat::chat))
            .route("/v1/chat/completions", post(openai_chat::chat))
            .route("/tokenize", post(text_tools::tokenize))
            .route("/detokenize", post(text_tools::detokenize))
            .route("/apply-template", post(text_tools::apply_template))
            .fallback(|| async { ApiError::new(Kind::NotFound, "File Not Found") })
            .method_not_allowed_fallback(|| async {
                ApiError::new(Kind::MethodNotAllowed, "this path does not take that method")
            })
            .layer(DefaultBodyLimit::max(app.config.body_limit))
            .layer(middleware::from_fn_with_state(app.clone(), auth::edge))
            .with_state(app)
    }

    /// Serves until `shutdown` is ready. Then no request is taken any more; running answers get the grace of the
    /// configuration to finish, after which they end with what they have.
    pub async fn serve(
        self,
        listener: TcpListener,
        shutdown: impl Future<Output = ()> + Send + 'static,
    ) -> io::Result<()> {
        let (stop, stopped) = oneshot::channel::<()>();
        let listener = listener.tap_io(|stream| {
            // Tokens are small packets that must not wait for each other.
            if let Err(error) = stream.set_nodelay(true) {
                tracing::debug!(%error, "TCP_NODELAY could not be set");
            }
        });
        let served = axum::serve(listener, self.router()).with_graceful_shutdown(async move {
            let _ = stopped.await;
        });
        let mut served = tokio::spawn(served.into_future());
        tokio::select! {
            result = &mut served => {
                self.app.runner.close().await;
                return result.unwrap_or_else(|panic| Err(io::Error::other(panic)));
            }
            () = shutdown => {}
        }
        tracing::info!(grace = ?self.app.config.shutdown_grace, "shutting down");
        self.app.runner.drain().await;
        let _ = stop.send(());
        if timeout(self.app.config.shutdown_grace, &mut served).await.is_err() {
            self.app.runner.finish().await;
            if timeout(LAST_WORDS, &mut served).await.is_err() {
                tracing::warn!("some clients did not take the end of their answers");
                served.abort();
            }
        }
        self.app.runner.close().await;
        Ok(())
    }
}

/// How long clients may take to receive the ends of answers that were cut short.
const LAST_WORDS: Duration = Duration::from_secs(2);
