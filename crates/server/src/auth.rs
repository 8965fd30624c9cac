//! API keys: `Authorization: Bearer K` or `X-Api-Key: K`, one of several; and the headers that browsers want.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::{Request, State},
    http::{HeaderMap, HeaderValue, Method, StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};

use crate::{
    app::App,
    error::{ApiError, Kind},
};

/// Paths that anybody may see: whether the server is well, and what it serves.
const PUBLIC: &[&str] = &["/health", "/v1/health", "/models", "/v1/models"];

/// What happens to every request before its handler, and to every reply after.
pub(crate) async fn edge(State(app): State<Arc<App>>, request: Request<Body>, next: Next) -> Response {
    let origin = request.headers().get(header::ORIGIN).cloned();
    let mut response = if request.method() == Method::OPTIONS {
        // Browsers ask before they send a key.
        StatusCode::NO_CONTENT.into_response()
    } else if !PUBLIC.contains(&request.uri().path()) && !may_pass(&app.config.api_keys, request.headers()) {
        ApiError::new(Kind::Authentication, "Invalid API Key").into_response()
    } else {
        next.run(request).await
    };
    let headers = response.headers_mut();
    headers.insert(header::SERVER, HeaderValue::from_static("paceline"));
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin.unwrap_or(HeaderValue::from_static("*")));
    headers.insert(header::ACCESS_CONTROL_ALLOW_CREDENTIALS, HeaderValue::from_static("true"));
    headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, POST, OPTIONS"));
    headers.insert(
        header::ACCESS_CONTROL_ALLOW_HEADERS,
        HeaderValue::from_static("*, Authorization, Content-Type"),
    );
    response
}

fn may_pass(keys: &[String], headers: &HeaderMap) -> bool {
    if keys.is_empty() {
        return true;
    }
    let text = |value: &HeaderValue| value.as_bytes().to_vec();
    let bearer = headers.get(header::AUTHORIZATION).map(text);
    let bearer = bearer.as_deref().and_then(|value| {
        let (scheme, key) = value.split_at_checked(7)?;
        scheme.eq_ignore_ascii_case(b"Bearer ").then_some(key)
    });
    let plain = headers.get("x-api-key").map(text);
    let shown = [bearer, plain.as_deref()];
    shown.into_iter().flatten().any(|shown| keys.iter().any(|key| same(key.as_bytes(), shown)))
}

/// Compares in a time that does not tell how much of the key was right.
fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |diff, (a, b)| diff | (a ^ b)) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(header: &'static str, value: &'static str, expected: bool) {
        let keys = ["one".to_owned(), "two".to_owned()];
        let mut headers = HeaderMap::new();
        headers.insert(header, HeaderValue::from_static(value));
        assert_eq!(may_pass(&keys, &headers), expected, "{header}: {value}");
    }

    #[test]
    fn keys() {
        check("authorization", "Bearer one", true);
        check("authorization", "bearer two", true);
        check("x-api-key", "two", true);
        check("authorization", "one", false);
        check("authorization", "Bearer tw", false);
        check("authorization", "Bearer twoo", false);
        check("x-api-key", "", false);
        assert!(may_pass(&[], &HeaderMap::new()) && !may_pass(&["k".into()], &HeaderMap::new()));
    }
}
