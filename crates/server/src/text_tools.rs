//! `POST /tokenize`, `/detokenize`, `/apply-template`: the text side of the model without the model.

use std::sync::Arc;

use axum::{Json, extract::State};
use paceline_engine::Token;
use paceline_text::Encode;
use serde_json::{Value, json};

use crate::{
    app::{App, Body, prepare},
    error::ApiError,
    fields::{Fields, show},
    openai_chat::render,
    prompt,
};

/// Text to token ids, with each token's text if asked for.
pub(crate) async fn tokenize(State(app): State<Arc<App>>, body: Body) -> Result<Json<Value>, ApiError> {
    prepare(&app, body, |app, body| {
        let fields = Fields::of_body(body)?;
        let options = Encode {
            add_bos: fields.bool("add_special")?.unwrap_or(false),
            parse_special: fields.bool("parse_special")?.unwrap_or(true),
        };
        let tokenizer = &app.model.tokenizer;
        let tokens = match fields.get("content") {
            None => Vec::new(),
            Some(Value::String(text)) => tokenizer.encode(text, options),
            Some(Value::Array(parts)) => {
                let mut tokens = Vec::new();
                for (i, part) in parts.iter().enumerate() {
                    match part {
                        Value::String(text) => tokens.extend(
                            tokenizer.encode(text, Encode { add_bos: options.add_bos && i == 0, ..options }),
                        ),
                        part => tokens.push(prompt::token(tokenizer, part, &format!("content[{i}]"))?),
                    }
                }
                tokens
            }
            Some(other) => return Err(ApiError::field("content", "a string", show(other))),
        };
        if !fields.bool("with_pieces")?.unwrap_or(false) {
            return Ok(Json(json!({ "tokens": tokens })));
        }
        let piece = |&id: &Token| {
            let bytes = tokenizer.vocab().bytes(id, true);
            // Part of a character is no text: its bytes are listed.
            let piece = std::str::from_utf8(bytes).map_or_else(|_| json!(bytes), |text| json!(text));
            json!({"id": id, "piece": piece})
        };
        Ok(Json(json!({"tokens": tokens.iter().map(piece).collect::<Vec<_>>()})))
    })
    .await
}

/// Token ids to text.
pub(crate) async fn detokenize(State(app): State<Arc<App>>, body: Body) -> Result<Json<Value>, ApiError> {
    prepare(&app, body, |app, body| {
        let fields = Fields::of_body(body)?;
        let mut tokens = Vec::new();
        for (i, value) in fields.array("tokens")?.into_iter().flatten().enumerate() {
            tokens.push(prompt::token(&app.model.tokenizer, value, &format!("tokens[{i}]"))?);
        }
        Ok(Json(json!({"content": app.model.tokenizer.decode(&tokens)})))
    })
    .await
}

/// A chat as the prompt that the model would get.
pub(crate) async fn apply_template(State(app): State<Arc<App>>, body: Body) -> Result<Json<Value>, ApiError> {
    prepare(&app, body, |app, body| Ok(Json(json!({"prompt": render(&Fields::of_body(body)?, app)?.text}))))
        .await
}
