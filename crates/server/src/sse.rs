//! Server-sent events: each is `data: <json>` and a blank line.
//!
//! The stream is pulled by the connection. When the client goes away the connection drops it, with it the
//! [`Group`], and so the requests behind it are cancelled: no task of ours outlives its client.

use std::{convert::Infallible, time::Duration};

use axum::{
    body::{Body, Bytes},
    http::{HeaderValue, header},
    response::Response,
};
use futures_util::stream::unfold;
use serde_json::Value;
use tokio::time::timeout;

use crate::{
    answer::{End, Group},
    error::ApiError,
    params::Params,
    runner::Progress,
};

/// Turns progress into the objects of a stream.
pub(crate) trait Chunks: Send + 'static {
    /// Objects for something that happened to answer `index`; none is fine.
    fn chunks(&mut self, index: usize, progress: Progress) -> Vec<Value>;
    /// Objects after all answers are complete.
    fn last(&mut self) -> Vec<Value>;
    /// Whether the stream ends with `data: [DONE]`.
    fn says_done(&self) -> bool;
}

struct Stream<C> {
    group: Group,
    chunks: C,
    n_left: usize,
    ping_interval: Option<Duration>,
    wants_nothing: bool,
    over: bool,
}

/// The response that streams `group` through `chunks`. Fails as an ordinary response while there is no token yet.
pub(crate) async fn respond(
    mut group: Group,
    chunks: impl Chunks,
    params: &Params,
) -> Result<Response, ApiError> {
    group.first(params.ping_interval, params.return_progress).await?;
    let stream = Stream {
        n_left: group.n,
        group,
        chunks,
        ping_interval: params.ping_interval,
        wants_nothing: params.n_predict == Some(0),
        over: false,
    };
    let body = unfold(stream, |mut stream| async move {
        let bytes = stream.next().await?;
        Some((Ok::<_, Infallible>(Bytes::from(bytes)), stream))
    });
    let mut response = Response::new(Body::from_stream(body));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Asks proxies to pass events on as they come.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    Ok(response)
}

impl<C: Chunks> Stream<C> {
    /// The next bytes to send; none when all is said.
    async fn next(&mut self) -> Option<String> {
        while !self.over {
            let next = match self.ping_interval {
                Some(silence) => match timeout(silence, self.group.next()).await {
                    Ok(next) => next,
                    Err(_) => return Some(":\n\n".to_owned()),
                },
                None => self.group.next().await,
            };
            let mut out = String::new();
            match next {
                Err(error) => {
                    event(&mut out, &error.body());
                    self.over = true;
                }
                Ok((index, progress)) => {
                    let done = matches!(progress, Progress::Done { .. });
                    if let Some(progress) = self.wanted(progress) {
                        self.chunks.chunks(index, progress).iter().for_each(|chunk| event(&mut out, chunk));
                    }
                    self.n_left -= usize::from(done);
                    if self.n_left == 0 {
                        self.chunks.last().iter().for_each(|chunk| event(&mut out, chunk));
                        if self.chunks.says_done() {
                            out.push_str("data: [DONE]\n\n");
                        }
                        self.over = true;
                    }
                }
            }
            if !out.is_empty() {
                return Some(out);
            }
        }
        None
    }

    /// Hides the token of requests that wanted none.
    fn wanted(&self, progress: Progress) -> Option<Progress> {
        if !self.wants_nothing {
            return Some(progress);
        }
        match progress {
            Progress::Tokens { .. } => None,
            Progress::Done { ending, stats, timings, .. } => {
                let End { ending, stats, timings } = End { ending, stats, timings }.of_nothing();
                Some(Progress::Done { text: String::new(), ending, stats, timings })
            }
            other => Some(other),
        }
    }
}

fn event(out: &mut String, object: &Value) {
    out.push_str("data: ");
    out.push_str(&object.to_string());
    out.push_str("\n\n");
}
