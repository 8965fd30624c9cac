//! What can be asked about the server: `/health`, `/v1/models`, `/props`, `/slots`, `/metrics`.

use std::{fmt::Write, sync::Arc};

use axum::{
    Json,
    extract::{Query, State},
    http::{HeaderName, HeaderValue, header},
    response::{IntoResponse, Response},
};
use paceline_engine::Phase;
use paceline_text::Token;
use serde_json::{Map, Value, json};

use crate::{
    app::App,
    envelope::unix_seconds,
    error::ApiError,
    params::Params,
    runner::{EngineStatus, Health},
};

/// 200 while requests are served.
pub(crate) async fn health(State(app): State<Arc<App>>) -> Result<Json<Value>, ApiError> {
    match app.runner.health() {
        Health::Ok => Ok(Json(json!({"status": "ok"}))),
        Health::Loading => Err(ApiError::unavailable("Loading model", 1)),
        Health::Restarting(reason) => {
            Err(ApiError::unavailable(format!("the engine failed and is made again: {reason}"), 1))
        }
        Health::Down(reason) => Err(ApiError::unavailable(format!("the engine is not running: {reason}"), 5)),
        Health::ShuttingDown => Err(ApiError::unavailable("the server is shutting down", 5)),
    }
}

/// The one model, in OpenAI's form and in one that Ollama's clients read.
pub(crate) async fn models(State(app): State<Arc<App>>) -> Json<Value> {
    let model = &app.model;
    let meta = json!({
        "vocab_type": model.vocab_type,
        "n_vocab": model.tokenizer.vocab().len(),
        "n_ctx": app.runner.config.n_ctx,
        "n_ctx_train": model.n_ctx_train,
        "n_embd": model.n_embd,
        "n_params": model.n_params,
        "size": model.size,
        "ftype": model.ftype,
    });
    Json(json!({
        "models": [{
            "name": model.id,
            "model": model.id,
            "modified_at": "",
            "size": model.size.to_string(),
            "digest": "",
            "type": "model",
            "description": "",
            "tags": [""],
            "capabilities": ["completion"],
            "parameters": "",
            "details": {
                "parent_model": "",
                "format": "gguf",
                "family": "",
                "families": [""],
                "parameter_size": "",
                "quantization_level": model.ftype,
            },
        }],
        "object": "list",
        "data": [{
            "id": model.id,
            "aliases": model.aliases,
            "tags": [],
            "object": "model",
            "created": unix_seconds(app.started),
            "owned_by": "paceline",
            "meta": meta,
        }],
    }))
}

/// The server's settings.
pub(crate) async fn props(State(app): State<Arc<App>>) -> Json<Value> {
    let (model, config) = (&app.model, &app.runner.config);
    let template = &model.chat_template;
    let can = template.capabilities();
    let text = |token: Option<Token>| {
        let vocab = model.tokenizer.vocab();
        token.map_or_else(String::new, |token| String::from_utf8_lossy(vocab.bytes(token, true)).into_owned())
    };
    let defaults = Params::defaults(&app).settings(&app);
    let speculative = app.runner.drafter.as_ref().map_or_else(
        || json!({"type": "none"}),
        |(name, contract)| json!({"type": name, "n_max": config.n_draft_max, "contract": contract}),
    );
    Json(json!({
        "default_generation_settings": {"params": defaults, "n_ctx": config.n_ctx},
        "total_slots": config.n_slot,
        "model_alias": model.id,
        "model_path": model.path,
        "model_ftype": model.ftype,
        "modalities": {"vision": false, "video": false, "audio": false},
        "media_marker": "",
        "endpoint_slots": app.config.slots,
        "endpoint_props": false,
        "endpoint_metrics": app.config.metrics,
        "ui": false,
        "ui_settings": {},
        "chat_template": template.source(),
        "chat_template_is_fallback": template.is_fallback(),
        "chat_template_caps": {
            "supports_system_role": can.system_role,
            "supports_tools": can.tools,
            "supports_tool_calls": can.tool_calls,
            "supports_object_arguments": can.object_arguments,
            "supports_enable_thinking": can.enable_thinking,
            "supports_string_content": can.string_content,
            "supports_typed_content": can.content_parts,
        },
        "bos_token": text(model.tokenizer.vocab().bos()),
        "eos_token": text(model.tokenizer.vocab().eos()),
        "build_info": app.config.build_info,
        "is_sleeping": false,
        "cors_proxy_enabled": false,
        "speculative": speculative,
    }))
}

/// Changing them is not offered.
pub(crate) async fn change_props() -> ApiError {
    ApiError::not_supported(
        "changing settings of a running server is not supported; restart it with other flags",
    )
}

async fn look(app: &App) -> Result<Box<EngineStatus>, ApiError> {
    app.runner.status().await.ok_or_else(|| ApiError::server("the engine's thread has ended"))
}

/// What each slot is doing.
pub(crate) async fn slots(
    State(app): State<Arc<App>>,
    Query(query): Query<Vec<(String, String)>>,
) -> Result<Json<Value>, ApiError> {
    if !app.config.slots {
        return Err(ApiError::not_supported("this server was started with --no-slots"));
    }
    let status = look(&app).await?;
    let must_be_free = query.iter().any(|(name, value)| name == "fail_on_no_slot" && value == "1");
    if must_be_free && status.n_busy() == status.slots.len() {
        return Err(ApiError::unavailable("no slot available", 1));
    }
    let slots = status.slots.iter().map(|look| {
        let slot = &look.status;
        let mut object = Map::new();
        object.insert("id".into(), slot.id.into());
        object.insert("n_ctx".into(), app.runner.config.n_ctx.into());
        object.insert("speculative".into(), app.runner.drafter.is_some().into());
        object.insert("is_processing".into(), (slot.phase != Phase::Idle).into());
        if slot.request.is_none() {
            object.insert("n_tokens_kept".into(), look.n_kept.into());
        }
        if let Some(request) = slot.request {
            object.insert("id_task".into(), request.0.into());
            object.insert("n_prompt_tokens".into(), slot.n_prompt.into());
            object.insert("n_prompt_tokens_processed".into(), slot.n_prompt_computed.into());
            object.insert("n_prompt_tokens_cache".into(), look.n_cached.into());
            object.insert("params".into(), look.settings.as_deref().cloned().unwrap_or_default());
            let n_remain = slot.n_remaining.map_or(-1, |n| n as i64);
            object.insert(
                "next_token".into(),
                json!([{"has_next_token": true, "n_remain": n_remain, "n_decoded": slot.n_predicted}]),
            );
            object.insert("draft_n".into(), slot.n_draft.0.into());
            object.insert("draft_n_accepted".into(), slot.n_draft.1.into());
        }
        Value::Object(object)
    });
    Ok(Json(slots.collect()))
}

/// Prometheus' text format, llama-server's names; ours begin with `paceline:`.
pub(crate) async fn metrics(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    if !app.config.metrics {
        return Err(ApiError::not_supported("this server was started without metrics"));
    }
    let status = look(&app).await?;
    let text = exposition(&status, app.runner.health() == Health::Ok);
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("text/plain; version=0.0.4")),
        (HeaderName::from_static("process-start-time-unix"), HeaderValue::from(unix_seconds(app.started))),
    ];
    Ok((headers, text).into_response())
}

fn exposition(status: &EngineStatus, is_well: bool) -> String {
    let (totals, counters) = (&status.totals, &status.counters);
    let (drafts, drafted, accepted) = counters.drafts;
    let rate = |n: u64, seconds: f64| if seconds > 0.0 { n as f64 / seconds } else { 0.0 };
    let per_step = |n: u64| if counters.n_step > 0 { n as f64 / counters.n_step as f64 } else { 0.0 };
    let mut out = String::new();
    let mut metric = |name: &str, kind: &str, help: &str, value: f64| {
        let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}");
    };
    let counter = "counter";
    let gauge = "gauge";
    metric("llamacpp:prompt_tokens_total", counter, "Prompt tokens computed.", totals.prompt_tokens as f64);
    metric("llamacpp:prompt_seconds_total", counter, "Time spent on prompts.", totals.prompt_seconds);
    metric("llamacpp:tokens_predicted_total", counter, "Tokens generated.", totals.predicted_tokens as f64);
    metric(
        "llamacpp:tokens_predicted_seconds_total",
        counter,
        "Time spent generating.",
        totals.predicted_seconds,
    );
    metric("llamacpp:n_decode_total", counter, "Target forwards.", counters.n_step as f64);
    metric("llamacpp:n_tokens_max", counter, "Longest sequence so far.", counters.n_tokens_max as f64);
    metric("llamacpp:spec_decode_num_drafts_total", counter, "Drafts verified.", drafts as f64);
    metric(
        "llamacpp:spec_decode_num_draft_tokens_total",
        counter,
        "Drafted tokens verified.",
        drafted as f64,
    );
    metric(
        "llamacpp:spec_decode_num_accepted_tokens_total",
        counter,
        "Drafted tokens accepted.",
        accepted as f64,
    );
    let speed = rate(totals.prompt_tokens, totals.prompt_seconds);
    metric("llamacpp:prompt_tokens_seconds", gauge, "Prompt tokens per second since the start.", speed);
    let speed = rate(totals.predicted_tokens, totals.predicted_seconds);
    metric(
        "llamacpp:predicted_tokens_seconds",
        gauge,
        "Generated tokens per second and slot since the start.",
        speed,
    );
    metric("llamacpp:requests_processing", gauge, "Slots at work.", status.n_busy() as f64);
    metric("llamacpp:requests_deferred", gauge, "Requests waiting for a slot.", status.n_waiting as f64);
    metric("llamacpp:n_busy_slots_per_decode", gauge, "Mean slots in a forward.", per_step(counters.n_lane));
    metric("paceline:rows_per_decode", gauge, "Mean rows in a forward.", per_step(counters.n_row));
    metric("paceline:requests_done_total", counter, "Requests answered.", totals.n_done as f64);
    metric(
        "paceline:requests_failed_total",
        counter,
        "Requests that failed after a start.",
        totals.n_failed as f64,
    );
    metric(
        "paceline:requests_cancelled_total",
        counter,
        "Requests whose client went away.",
        totals.n_cancelled as f64,
    );
    metric("paceline:requests_refused_total", counter, "Requests not taken.", totals.n_refused as f64);
    metric(
        "paceline:engine_restarts_total",
        counter,
        "Times that the engine was made again.",
        totals.n_restart as f64,
    );
    metric("paceline:engine_up", gauge, "1 while requests are served.", f64::from(u8::from(is_well)));
    metric(
        "paceline:unusable_logits_total",
        counter,
        "Requests that failed on logits that are not numbers.",
        counters.n_bad_logits as f64,
    );
    metric(
        "paceline:unusable_drafts_total",
        counter,
        "Drafts dropped because the drafter's output was not numbers or not tokens.",
        counters.n_bad_drafts as f64,
    );
    for (stage, time, help) in [
        ("draft", counters.times.draft, "Time in the drafter's forwards."),
        ("verify", counters.times.verify, "Time in the target's forwards, those of prompts included."),
        (
            "commit",
            counters.times.commit,
            "Time for choosing tokens and for making them final in both memories.",
        ),
    ] {
        let name = format!("paceline:spec_{stage}_seconds_total");
        metric(&name, counter, help, time.as_secs_f64());
    }
    metric(
        "paceline:requests_parked_total",
        counter,
        "Times that a request waited again for want of memory.",
        counters.n_parked as f64,
    );
    let cache = &status.cache;
    for (name, kind, help, value) in [
        ("hits_total", counter, "Requests that began with a cached prefix.", cache.n_hit as f64),
        ("misses_total", counter, "Requests that might have and found none.", cache.n_miss as f64),
        ("tokens_total", counter, "Prompt tokens that a cache had.", cache.n_token_hit as f64),
        ("snapshots_taken_total", counter, "Snapshots taken.", cache.n_taken as f64),
        ("evictions_total", counter, "Snapshots dropped for want of room.", cache.n_evicted as f64),
        ("snapshots", gauge, "Snapshots held.", cache.n_snapshot as f64),
        (
            "bytes",
            gauge,
            "Bytes that only snapshots hold, those of the drafter included.",
            cache.bytes as f64,
        ),
        ("bytes_max", gauge, "Bytes that they may hold.", cache.n_byte_max as f64),
    ] {
        metric(&format!("paceline:cache_{name}"), kind, help, value);
    }
    if let Some(disk) = &cache.shelf {
        for (name, kind, help, value) in [
            ("files", gauge, "Cached prompts of this pair of models on the disk.", disk.n_file as f64),
            ("bytes", gauge, "Bytes of all files there, or on their way.", disk.bytes as f64),
            ("bytes_max", gauge, "Bytes that they may have.", disk.n_byte_max as f64),
            ("leaving", gauge, "Snapshots on their way to the disk.", disk.n_leaving as f64),
            ("writes_total", counter, "Files written.", disk.n_stored as f64),
            ("written_bytes_total", counter, "Bytes of them.", disk.n_byte_stored as f64),
            (
                "not_written_total",
                counter,
                "Snapshots dropped since the disk was slow, or full.",
                disk.n_not_stored as f64,
            ),
            ("reads_total", counter, "Files read and taken up.", disk.n_fetched as f64),
            (
                "not_read_total",
                counter,
                "Files that were damaged, gone or of no use.",
                disk.n_not_fetched as f64,
            ),
            ("evictions_total", counter, "Files removed for want of room.", disk.n_removed as f64),
        ] {
            metric(&format!("paceline:cache_disk_{name}"), kind, help, value);
        }
    }
    metric("paceline:memory_bytes", gauge, "Bytes of sequence state in use.", status.memory_bytes as f64);
    metric("paceline:kv_pages", gauge, "KV pages in use.", status.n_page as f64);
    metric("paceline:kv_pages_max", gauge, "KV pages that may be in use.", status.n_page_max as f64);
    let bytes = status.drafter.as_ref().map_or(0, |drafter| drafter.state_bytes);
    metric("paceline:drafter_memory_bytes", gauge, "Bytes of drafter state in use.", bytes as f64);
    let name = "llamacpp:spec_decode_num_accepted_tokens_per_pos_total";
    let _ = writeln!(out, "# HELP {name} Accepted tokens by position in the draft.\n# TYPE {name} counter");
    for (position, n) in counters.accepted_by_position.iter().enumerate() {
        let _ = writeln!(out, "{name}{{position=\"{position}\"}} {n}");
    }
    let name = "paceline:drafter_active";
    let _ = writeln!(out, "# HELP {name} 1 for the drafter in use.\n# TYPE {name} gauge");
    let kind = status.drafter.as_ref().map_or("none", |drafter| &drafter.name);
    let _ = writeln!(out, "{name}{{type=\"{kind}\"}} {}", u8::from(status.drafter.is_some()));
    out
}
